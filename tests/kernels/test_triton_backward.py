"""The backward passes of linear attention in Triton: each against its twin in PyTorch, then all gradients of the op
against the recurrence in float64."""

import pytest
import torch
from compare import assert_close
from triton_twins import DECAYS, DEVICE, Twins, make_inputs

from lm_zoo.kernels import linear_attention
from lm_zoo.kernels.linear_attention import triton_passes

UPDATES = pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
EVERY_DECAY = pytest.mark.parametrize("decay", DECAYS)


def packed(*borders):
    return torch.tensor(borders, dtype=torch.int32, device=DEVICE)


# Odd sizes in several blocks, empty and short sequences, decays that forget all at once, values in groups.
SHAPES = {
    "packed": {"T": 72, "HV": 1, "K": 17, "V": 5, "cu_seqlens": packed(0, 0, 70, 71, 72, 72)},
    "strong": {"T": 70, "HV": 1, "lowest": -50.0, "resets": 0.1},
    "grouped": {"T": 30, "B": 2, "H": 2, "HV": 4, "K": 16, "V": 16},
    "float16": {"T": 67, "HV": 1, "K": 40, "V": 24, "dtype": torch.float16},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def twins_before(name, decay, delta, shape, **options):
    """With what the passes before `name` have found."""
    twins = Twins(decay, delta, **SHAPES[shape], **options)
    twins.advance_to(name)
    return twins


def compare(twins, name):
    tolerance = 1e-5 if twins.dtype == torch.float32 else 4e-3
    expected, actual = twins.expected(name), twins.found(name)
    for key, x in actual.items():
        if key in ("dA_qk", "dA_kk") and twins.decay != "channel":
            assert x is None, f"{key} is used up in {name}"
        elif x is None:
            assert expected[key] is None, f"{name}: {key}"
        else:
            select = twins.order if key == "dstates" else slice(None)
            assert_close(x[select], expected[key][select], tolerance, f"{name}: {key}")


@EVERY_SHAPE
@EVERY_DECAY
@UPDATES
def test_chunk_output_backward(decay, delta, shape):
    twins = twins_before("chunk_output_backward", decay, delta, shape)
    assert (twins.values["dstates"] is None) == delta
    compare(twins, "chunk_output_backward")


@EVERY_SHAPE
@EVERY_DECAY
@UPDATES
def test_chunk_states_backward(decay, delta, shape):
    twins = twins_before("chunk_states_backward", decay, delta, shape)
    compare(twins, "chunk_states_backward")


@EVERY_SHAPE
@EVERY_DECAY
@UPDATES
def test_chunk_gradients(decay, delta, shape):
    twins = twins_before("chunk_gradients", decay, delta, shape)
    compare(twins, "chunk_gradients")


@EVERY_SHAPE
@EVERY_DECAY
def test_delta_transform_backward(decay, shape):
    twins = twins_before("delta_transform_backward", decay, True, shape)
    compare(twins, "delta_transform_backward")


@UPDATES
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_passes_without_a_gradient_of_the_decay(decay, delta):
    twins = twins_before("chunk_gradients", decay, delta, "grouped", decay_gradient=False)
    names = ["delta_transform_backward"] * delta + ["chunk_scores_backward"] * (decay == "channel")
    for name in ["chunk_gradients", *names]:
        found = twins.found(name)
        assert {found[key] for key in ("dG", "dlog_decay") if key in found} == {None}
        compare(twins, name)
        twins.advance(name)


# ---- the whole op ----


def draw_weights(inputs, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = inputs["v"].shape, inputs["initial_state"].shape
    return [torch.randn(shape, generator=generator).to(dtype).double().to(DEVICE) for shape in shapes]


def gradients(inputs, weights, backend="triton", dtype=torch.float32, frozen=None, **options):
    """Of a weighted sum of the outputs and the final states; decays and states stay in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: None if x is None else x.to(wide if name in ("log_decay", "initial_state") else dtype, copy=True)
        for name, x in inputs.items()
    }
    arguments = {name: None if x is None else x.requires_grad_(name != frozen) for name, x in leaves.items()}
    found = linear_attention(**arguments, output_final_state=True, backend=backend, **options)
    sum((x * weight).sum() for x, weight in zip(found, weights, strict=True) if weight is not None).backward()
    return {f"d{name}": x.grad for name, x in leaves.items() if x is not None}


def check(inputs, tolerance=1e-5, dtype=torch.float32, weights=None, **options):
    weights = weights or draw_weights(inputs, dtype)
    expected = gradients(inputs, weights, "reference", torch.float64, **options)
    for name, x in gradients(inputs, weights, dtype=dtype, **options).items():
        assert_close(x, torch.zeros_like(x) if expected[name] is None else expected[name], tolerance, name)


@UPDATES
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "channel"])
def test_gradients_match_recurrence(decay, delta):
    check(make_inputs(decay, delta, T=71, K=17, V=9, lowest=-5.0), 5e-5)


@UPDATES
@EVERY_DECAY
def test_gradients_of_packed_sequences(decay, delta):
    cu_seqlens = packed(0, 0, 65, 66, 80, 80)
    check(make_inputs(decay, delta, T=80, HV=1, K=16, V=16, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


@UPDATES
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize(("lowest", "resets"), [(-50.0, 0.1), (-5.0, 1.0)])
def test_gradients_under_strong_decays_and_resets(decay, delta, lowest, resets):
    # In float32 a sum of thousands of nats keeps 1e-4 of a nat.
    check(make_inputs(decay, delta, T=66, HV=1, V=16, lowest=lowest, resets=resets), 1e-4)


@UPDATES
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gradients_of_size_e_to_the_minus_30(decay, delta):
    """Those of the decays are that small, and would be lost among terms of size 1 if those only cancelled."""
    inputs = make_inputs(decay, delta, T=66, HV=1, V=16)
    inputs["log_decay"].fill_(-30.0)
    check(inputs, 1e-4)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_gradients_of_heads_that_share_keys(decay):
    check(make_inputs(decay, True, T=20, B=2, H=2, HV=4, V=16))


@UPDATES
@EVERY_DECAY
def test_gradients_in_float16(decay, delta):
    if DEVICE == "cuda" and delta and decay == "scalar":
        pytest.skip("the op refuses it there: see _not_in_triton")
    inputs = make_inputs(decay, delta, T=67, HV=1, K=40, V=72, dtype=torch.float16)
    check(inputs, 5e-3, torch.float16)


@UPDATES
@EVERY_DECAY
def test_gradients_alone_and_among_others_are_bitwise_the_same(decay, delta):
    first, cu_seqlens = 65, packed(0, 65, 85)
    inputs = make_inputs(decay, delta, T=85, HV=1, V=16, cu_seqlens=cu_seqlens)
    weights = draw_weights(inputs, torch.float32)
    whole, again = (gradients(inputs, weights, cu_seqlens=cu_seqlens) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())

    def second(tensors):
        """The second sequence on its own."""
        return [None if x is None else x[1:] if len(x) == 2 else x[:, first:] for x in tensors]

    alone = gradients(dict(zip(inputs, second(inputs.values()), strict=True)), second(weights))
    for (name, x), part in zip(alone.items(), second(whole.values()), strict=True):
        assert torch.equal(x, part), name


@UPDATES
@pytest.mark.parametrize("decay", ["constant", "channel"])
def test_the_gradient_of_a_decay_is_formed_where_it_is_wanted(decay, delta, monkeypatch):
    inputs = make_inputs(decay, delta, T=66, HV=1, V=16)
    weights = draw_weights(inputs, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(triton_passes, "cumulative_decay_backward", None)  # nor is it called
        found = gradients(inputs, weights, frozen="log_decay")
    assert found.pop("dlog_decay") is None
    expected = gradients(inputs, weights, "reference", torch.float64)
    for name, x in found.items():
        assert_close(x, expected[name], 1e-5, name)


@pytest.mark.parametrize("used", [0, 1], ids=["outputs", "final state"])
def test_gradients_of_one_result_alone(used):
    inputs = make_inputs("scalar", True, T=66, HV=1, V=16)
    weights = draw_weights(inputs, torch.float32)
    weights[1 - used] = None
    check(inputs, weights=weights)
