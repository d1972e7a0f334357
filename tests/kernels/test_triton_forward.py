"""The forward passes in Triton, one by one against their torch twins, and the whole op against the recurrence."""

import pytest
import torch
from compare import assert_close, relative_error
from triton_twins import DECAYS, DELTA_ONLY, DEVICE, Twins, make_inputs

from lm_zoo.kernels import linear_attention
from lm_zoo.kernels.linear_attention import triton_passes
from lm_zoo.kernels.linear_attention.chunkwise import chunkwise_forward

FORWARD = ("chunk_scores", "delta_transform", "delta_apply", "chunk_states", "chunk_output")
UPDATES = pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
# Of the norm of a result: float16 rounds every operand and result to 2^-11, some of them more than once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def packed(*borders):
    return torch.tensor(borders, dtype=torch.int32, device=DEVICE)


def run(inputs, dtype=torch.float32, backend="triton", **options):
    """o and the final state; the decays and the initial state go in float32 at least, as layers have them."""
    wide = torch.promote_types(dtype, torch.float32)
    arguments = {
        name: None if x is None else x.to(wide if name in ("log_decay", "initial_state") else dtype)
        for name, x in inputs.items()
    }
    return linear_attention(**arguments, output_final_state=True, backend=backend, **options)


def check(inputs, tolerance=5e-6, dtype=torch.float32, **options):
    expected = run(inputs, torch.float64, "reference", **options)
    for name, x, wanted in zip(("o", "final state"), run(inputs, dtype, **options), expected, strict=True):
        assert_close(x, wanted, tolerance, name)


# ---- pass by pass ----


@UPDATES
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [{"T": 65, "B": 2}, {"T": 66, "cu_seqlens": packed(0, 1, 1, 66)}], ids=["B", "N"])
def test_each_pass_equals_its_twin(layout, dtype, decay, delta):
    twins = Twins(decay, delta, dtype=dtype, **layout)
    for name in FORWARD:
        if delta or name not in DELTA_ONLY:
            initial = twins.values["state"]
            twins.compare(name, TOLERANCE[dtype], absent=() if decay == "channel" else ("A_qk",))
            twins.advance(name)
            twins.values["state"] = initial


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inverse_has_the_accuracy_of_substitution(dtype):
    """Keys that nearly agree, and a strong beta: the inverse is large, and its powers would have to cancel."""
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(1 + 0.02 * torch.randn(1, 64, 1, 16, generator=generator), dim=-1).to(DEVICE)
    A_kk = torch.einsum("bihd,bjhd->bihj", k, k).transpose(1, 2).tril(-1).transpose(1, 2).contiguous()
    beta = torch.full((1, 64, 1), 2.0, device=DEVICE)
    eye = torch.eye(64, device=DEVICE)
    whole = eye + 2 * A_kk[0, :, 0]
    exact = torch.linalg.inv(whole.double())
    assert exact.norm() > 50
    q = k.to(dtype)
    T = triton_passes.delta_transform(A_kk, beta, triton_passes.cut(q, q, None))[0, :, 0]
    if dtype == torch.float32:  # how near substitution comes depends on the CPU's library: 0.2 to 2 times this
        assert relative_error(T, exact) < torch.linalg.cond(exact).item() * 2**-24 / 16
    else:  # twice: to bfloat16 the interpreter cuts off where a GPU rounds
        assert relative_error(T, exact) < 2.2 * relative_error(exact.to(dtype), exact)
    assert (T.triu(1) == 0).all()


# ---- the whole op ----


@UPDATES
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "channel"])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_matches_recurrence(T, decay, delta):
    check(make_inputs(decay, delta, T=T))


@UPDATES
@pytest.mark.parametrize("decay", DECAYS)
def test_float16(decay, delta):
    inputs = make_inputs(decay, delta, T=65, dtype=torch.float16)
    o, state = run(inputs, torch.float16)
    assert (o.dtype, state.dtype) == (torch.float16, torch.float32)
    check(inputs, 5e-3, torch.float16)


@UPDATES
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences(decay, delta):
    """Empty and short ones, one that ends with a chunk and one that does not."""
    cu_seqlens = packed(0, 0, 1, 65, 132, 132)
    check(make_inputs(decay, delta, T=132, H=1, HV=1, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


@UPDATES
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize(("lowest", "resets"), [(-50.0, 0.1), (-1.0, 0.1), (-5.0, 1.0)])
def test_strong_decays_and_resets(decay, delta, lowest, resets):
    """Across a reset, float32 keeps differences of G to 2^-24 of the sum: some 1e-5."""
    check(make_inputs(decay, delta, T=70, HV=1, lowest=lowest, resets=resets), 5e-5)


@pytest.mark.parametrize(("K", "V"), [(24, 40), (80, 17), (3, 2), (130, 72)])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_sizes_that_are_no_powers_of_two(K, V, decay):
    check(make_inputs(decay, True, T=66, HV=1, K=K, V=V))


@pytest.mark.parametrize(("H", "HV"), [(2, 2), (2, 6)])
@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_value_heads_that_share_keys(H, HV, decay):
    check(make_inputs(decay, True, T=66, H=H, HV=HV))


@UPDATES
@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_alone_and_among_others_is_bitwise_the_same(decay, delta):
    first, T = 65, 130
    cu_seqlens = packed(0, first, T)
    inputs = make_inputs(decay, delta, T=T, HV=1, cu_seqlens=cu_seqlens)
    o, state = run(inputs, cu_seqlens=cu_seqlens)
    second = {name: None if x is None else x[:, first:] for name, x in inputs.items()}
    second["initial_state"] = inputs["initial_state"][1:]
    alone, alone_state = run(second)
    assert torch.equal(o[:, first:], alone)
    assert torch.equal(state[1:], alone_state)
    batch = {name: None if x is None else torch.cat([x.flip(1), x]) for name, x in second.items()}
    o, state = run(batch)
    assert torch.equal(o[1:], alone)
    assert torch.equal(state[1:], alone_state)


@UPDATES
def test_two_calls_equal_one(delta):
    inputs = make_inputs("scalar", delta, T=90, HV=1)
    o, state = run(inputs)
    parts = [
        {name: None if x is None else x[:, cut] for name, x in inputs.items()} for cut in (slice(37), slice(37, 90))
    ]
    parts[0]["initial_state"] = inputs["initial_state"]
    early, parts[1]["initial_state"] = run(parts[0])
    late, late_state = run(parts[1])
    assert_close(torch.cat([early, late], dim=1), o.double(), 2e-6, "o")
    assert_close(late_state, state.double(), 2e-6, "final state")


def test_strided_inputs_and_no_initial_state():
    inputs = make_inputs("scalar", True, T=66, B=2, H=2, HV=2)
    inputs["initial_state"] = None
    inputs["q"] = inputs["q"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["v"] = inputs["v"].transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs)


def test_the_initial_state_stays_as_it_was():
    inputs = {name: x if x is None else x.float() for name, x in make_inputs("scalar", True, T=5).items()}
    before = inputs["initial_state"].clone()
    linear_attention(**inputs, backend="triton")
    assert torch.equal(inputs["initial_state"], before)


@UPDATES
@pytest.mark.parametrize("decay", DECAYS)
def test_what_is_saved_is_what_the_compiler_is_told(decay, delta):
    names = ("q", "k", "v", "log_decay", "beta", "initial_state")
    inputs = make_inputs(decay, delta, T=5, dtype=torch.float16)
    arguments = [None if inputs[name] is None else inputs[name].half() for name in names]
    saved = chunkwise_forward(*arguments, None, 0.5, True, True, "triton")
    meta = [None if x is None else x.to("meta") for x in arguments]
    for x, fake in zip(saved, chunkwise_forward(*meta, None, 0.5, True, True, "triton"), strict=True):
        assert (x.shape, x.dtype) == (fake.shape, fake.dtype)
    kept = [x.numel() > 0 for x in saved[2:]]
    assert kept == [decay == "channel", decay == "channel" and delta, delta]
