"""The chunkwise form against the recurrence in float64: outputs, final states and every gradient."""

import pytest
import torch
from compare import assert_close, relative_error

from lm_zoo.kernels import linear_attention, linear_attention_step
from lm_zoo.kernels.linear_attention import torch_passes

DECAYS = ["none", "constant", "scalar", "channel"]


def make_inputs(decay, delta, *, T, B=2, H=2, HV=4, K=16, V=24, lowest=-1.0, resets=0.0, states=None, seed=0):
    """Float64 inputs whose values are exact in float32, so that both precisions see the same problem."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    def uniform(*shape):
        return torch.rand(*shape, generator=generator).double()

    shape = {"none": None, "constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}[decay]
    log_decay = None if shape is None else lowest * uniform(*shape)
    if log_decay is not None and resets:
        log_decay[uniform(*shape) < resets] = -torch.inf
    return {
        "q": draw(B, T, H, K),
        "k": torch.nn.functional.normalize(draw(B, T, H, K), dim=-1).float().double(),
        "v": draw(B, T, HV, V),
        "log_decay": log_decay,
        "beta": 2 * uniform(B, T, HV) if delta else None,
        "initial_state": draw(states or B, HV, K, V),
    }


def run(inputs, backend, dtype, frozen=None, **options):
    """Outputs, final state and gradients of a random linear loss."""
    leaves = {
        name: None if x is None else x.detach().to(dtype, copy=True).requires_grad_(name != frozen)
        for name, x in inputs.items()
    }
    o, state = linear_attention(**leaves, output_final_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator).double()).sum() for x in (o, state))
    loss.backward()
    gradients = {f"d{name}": x.grad for name, x in leaves.items() if x is not None}
    return {"o": o, "final state": state, **gradients}


def check(inputs, tolerance, dtype=torch.float32, **options):
    expected = run(inputs, "reference", torch.float64, **options)
    actual = run(inputs, "torch", dtype, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130])
def test_matches_recurrence(T, decay, delta):
    check(make_inputs(decay, delta, T=T, lowest=-5.0), 1e-5)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_long_sequence_of_several_segments(decay, delta, monkeypatch):
    monkeypatch.setattr(torch_passes, "SEGMENT_ELEMENTS", 4 * 2 * 64 * 24)
    check(make_inputs(decay, delta, T=1000, B=1, H=1, HV=2, lowest=-0.5), 1e-5)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
@pytest.mark.parametrize(("lowest", "resets"), [(-50.0, 0.0), (-50.0, 0.1), (-1.0, 0.1), (-5.0, 1.0)])
def test_strong_decays_and_resets(decay, delta, lowest, resets):
    check(make_inputs(decay, delta, T=130, lowest=lowest, resets=resets), 1e-5)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
def test_one_strong_channel_among_weak_ones(delta):
    inputs = make_inputs("channel", delta, T=70, lowest=-0.01)
    inputs["log_decay"][..., 3] = -40.0
    check(inputs, 1e-5)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("bounds", [[0, 200], [0, 1, 1, 70, 134, 200], [0, 0, 64, 128, 200, 200]])
def test_packed_sequences(bounds, decay, delta, monkeypatch):
    monkeypatch.setattr(torch_passes, "SEGMENT_ELEMENTS", 3 * 2 * 64 * 24)
    inputs = make_inputs(decay, delta, T=200, B=1, H=1, HV=2, resets=0.1, states=len(bounds) - 1)
    check(inputs, 1e-5, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(decay, delta):
    inputs = make_inputs(decay, delta, T=66, B=1, H=1, HV=2, K=3, V=2)
    names = [name for name, x in inputs.items() if x is not None]

    def function(*tensors):
        return linear_attention(**dict(zip(names, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16(decay, delta):
    inputs = make_inputs(decay, delta, T=130)
    assert run(inputs, "torch", torch.bfloat16)["o"].dtype == torch.bfloat16
    rounded = {name: None if x is None else x.bfloat16().double() for name, x in inputs.items()}
    check(rounded, 1e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_equal_the_whole(decay, delta):
    x = make_inputs(decay, delta, T=9)
    expected, expected_state = linear_attention(**x, output_final_state=True)

    def at(name, index):
        return x[name] if x[name] is None or x[name].dim() == 1 else x[name][:, index]

    names = ("q", "k", "v", "log_decay", "beta")
    for sizes in ([1] * 9, [4, 1, 4]):
        state, address, outputs, start = x["initial_state"].clone(), None, [], 0
        address = state.data_ptr()
        for size in sizes:
            outputs.append(linear_attention_step(*(at(name, slice(start, start + size)) for name in names), state))
            start += size
        assert_close(torch.cat(outputs, dim=1), expected, 1e-12, "outputs")
        assert_close(state, expected_state, 1e-12, "state")
        assert state.data_ptr() == address
    state = x["initial_state"].clone()
    first = linear_attention_step(*(at(name, 0) for name in names), state)  # without a time dimension
    assert_close(first, expected[:, 0], 1e-12)


def test_any_split_equals_one_call():
    x = make_inputs("channel", True, T=150)
    expected, expected_state = linear_attention(**x, output_final_state=True)
    state, outputs = x.pop("initial_state"), []
    for start, stop in ((0, 1), (1, 64), (64, 70), (70, 150)):
        part = {name: value[:, start:stop] for name, value in x.items()}
        o, state = linear_attention(**part, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert_close(torch.cat(outputs, dim=1), expected, 1e-12, "outputs")
    assert_close(state, expected_state, 1e-12, "state")


def test_the_op_changes_none_of_its_inputs():
    x = make_inputs("channel", True, T=70)
    copies = {name: value.clone() for name, value in x.items()}
    run(x, "torch", torch.float64)
    for name, value in copies.items():
        assert torch.equal(x[name].detach(), value), name


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
def test_the_gradient_of_a_decay_is_formed_where_it_is_wanted(decay, delta, monkeypatch):
    inputs = make_inputs(decay, delta, T=130)
    expected = run(inputs, "torch", torch.float64)
    assert expected["dlog_decay"] is not None
    monkeypatch.setattr(torch_passes, "cumulative_decay_backward", None)
    monkeypatch.setattr(torch_passes, "_decay_gradient", None)
    found = run(inputs, "torch", torch.float64, frozen="log_decay")
    assert found.pop("dlog_decay") is None
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize(("decay", "delta"), [("none", False), ("scalar", True), ("channel", False)])
def test_compiles_without_a_graph_break(decay, delta, packed):
    inputs = make_inputs(decay, delta, T=70, B=1, states=2 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 30, 70])} if packed else {}
    expected = run(inputs, "torch", torch.float64, **options)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    names = [name for name, x in inputs.items() if x is not None]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    o, state = compiled(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=generator).double()).sum() for x in (o, state)).backward()
    assert_close(o, expected["o"], 1e-12, "o")
    for name in names:
        assert_close(leaves[name].grad, expected[f"d{name}"], 1e-12, f"d{name}")


def test_autocast_does_not_reach_inside():
    inputs = make_inputs("scalar", True, T=70)
    expected = run(inputs, "torch", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(inputs, "torch", torch.float32)  # forward and backward
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("learned", [False, True], ids=["decay given", "decay learned"])
def test_custom_op_is_registered_faithfully(learned):
    x = make_inputs("scalar", True, T=70)
    arguments = [x[name].requires_grad_() for name in ("q", "k", "v", "log_decay", "beta", "initial_state")]
    arguments[3].requires_grad_(learned)
    arguments += [None, 0.5, True, learned, "torch"]
    torch.library.opcheck(torch.ops.lm_zoo.linear_attention, arguments)
    o, _, *saved = torch.ops.lm_zoo.linear_attention(*arguments)
    tensors, (scale, _, *options) = arguments[:7], arguments[7:]
    arguments = [o, None, *tensors, *saved, scale, *options]
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.lm_zoo.linear_attention_backward, arguments)


def test_resets_forget_exactly():
    x = make_inputs("scalar", False, T=100)
    x["log_decay"][:, 40] = -torch.inf
    whole, _ = linear_attention(**x)
    tail = {name: value[:, 40:] for name, value in x.items() if name not in ("beta", "initial_state")}
    assert_close(whole[:, 40:], linear_attention(**tail)[0], 1e-14)


def test_comparer_sees_a_wrong_decay():
    """The tolerance is tight enough: a decay that is off by 1e-4 nats does not pass."""
    inputs = make_inputs("scalar", False, T=130)
    right = run(inputs, "reference", torch.float64)["o"]
    inputs["log_decay"] = inputs["log_decay"] - 1e-4
    assert relative_error(run(inputs, "torch", torch.float64)["o"], right) > 2e-5


def bad(name, **changes):
    return pytest.param(name, changes, id="-".join([name, *changes]))


T5 = (2, 5, 2, 8)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        bad("q", q=torch.zeros(2, 5, 8)),
        bad("q", q=torch.zeros(T5, dtype=torch.int64)),
        bad("k", k=torch.zeros(2, 5, 2, 9)),
        bad("k", k=torch.zeros(T5, dtype=torch.float64)),
        bad("v", v=torch.zeros(2, 5, 3, 8)),
        bad("v", v=[1.0]),
        bad("log_decay", log_decay=torch.zeros(2, 5)),
        bad("log_decay", log_decay=torch.zeros(3)),
        bad("beta", beta=torch.zeros(2, 5, 3)),
        bad("initial_state", initial_state=torch.zeros(1, 2, 8, 8)),
        bad("cu_seqlens", cu_seqlens=torch.tensor([0, 5])),
        bad("log_decay", log_decay=torch.full((2, 5, 2), 0.1)),
        bad("log_decay", log_decay=torch.full((2,), torch.nan)),
        bad("beta", beta=torch.full((2, 5, 2), 2.1)),
        bad("beta", beta=torch.full((2, 5, 2), -0.1)),
        bad("initial_state", initial_state=torch.full((2, 2, 8, 8), torch.inf)),
        bad("backend", backend="cuda"),
        bad("v", v=torch.zeros(T5, device="meta")),
    ],
)
def test_bad_arguments_are_named(name, changes):
    arguments = {"q": torch.zeros(T5), "k": torch.zeros(T5), "v": torch.zeros(T5)} | changes
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        linear_attention(**arguments)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5]])
def test_bad_sequence_borders_are_named(bounds):
    x = torch.zeros(1, 5, 2, 8)
    with pytest.raises(ValueError, match=r"^cu_seqlens must"):
        linear_attention(x, x, x, cu_seqlens=torch.tensor(bounds))


def test_bad_steps_are_named():
    x, state = torch.zeros(2, 2, 8), torch.zeros(2, 2, 8, 8)
    for name, arguments in {
        "state": (x, x, x, None, None, state[:1]),
        "beta": (x, x, x, None, torch.zeros(2, 3), state),
        "log_decay": (x, x, x, torch.zeros(2, 3), None, state),
        "k": (x, x[:1], x, None, None, state),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            linear_attention_step(*arguments)
