"""The scan in two levels against the recurrence in float64: outputs, final states and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, relative_error

from lm_zoo.kernels import linear_scan, linear_scan_step
from lm_zoo.kernels.linear_scan import two_level

DECAYS = ["uniform", "negative", "one", "zeros among ones", "disc", "circle"]
NAMES = ("x", "decay", "initial_state")


def make_inputs(decays, *, T, B=2, D=6, states=None, seed=0):
    """In double precision, with values that are exact in single precision."""
    generator = torch.Generator().manual_seed(seed)
    single = torch.complex64 if decays in ("disc", "circle") else torch.float32
    uniform = torch.rand(B, T, D, generator=generator)
    angle = 6.3 * torch.rand(B, T, D, generator=generator)
    decay = {
        "uniform": uniform,
        "negative": -uniform,
        "one": torch.ones(B, T, D),
        "zeros among ones": (uniform > 0.1).float(),
        "disc": torch.polar(uniform, angle),
        "circle": torch.polar(torch.ones(B, T, D), angle),
    }[decays]
    x, state = (torch.randn(*shape, dtype=single, generator=generator) for shape in ((B, T, D), (states or B, D)))
    double = torch.promote_types(single, torch.float64)
    return {name: value.to(double) for name, value in zip(NAMES, (x, decay, state), strict=True)}


def run(inputs, backend, half=None, **options):
    """Outputs, final state and gradients of a random linear loss; x and decay in the dtype `half` if it is given."""
    leaves = {name: x.detach().clone() for name, x in inputs.items()}
    if half is not None:
        leaves |= {name: leaves[name].to(half) for name in ("x", "decay")}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    h, state = linear_scan(**leaves, output_final_state=True, backend=backend, **options)
    random_loss(h, state).backward()
    return {"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}


def random_loss(*outputs):
    generator = torch.Generator().manual_seed(1)
    return sum(
        (x.to(torch.complex128) * torch.randn(x.shape, dtype=torch.complex128, generator=generator)).sum().real
        for x in outputs
    )


def check(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value, tolerance, name)


def close(actual, expected, tolerance, what="tensor"):
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in (actual.detach(), expected.detach())]
    assert_close(*parts, tolerance, what)


def single(inputs):
    return {name: x.to(torch.complex64 if x.is_complex() else torch.float32) for name, x in inputs.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 5, 63, 64, 65, 130, 1000])
def test_matches_the_recurrence(T, decays, reverse):
    inputs = make_inputs(decays, T=T)
    expected = run(inputs, "reference", reverse=reverse)
    check(run(inputs, "torch", reverse=reverse), expected, 1e-12)
    actual = run(single(inputs), "torch", reverse=reverse)
    assert (
        actual["h"].dtype == actual["final state"].dtype == (torch.complex64 if decays in DECAYS[4:] else torch.float)
    )
    check(actual, expected, 1e-5)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("wide", [0, 2**13], ids=["token by token", "two levels"])
def test_several_segments(wide, reverse, monkeypatch):
    monkeypatch.setattr(two_level, "SEGMENT_ELEMENTS", 12 * 90)
    monkeypatch.setattr(two_level, "WIDE", wide)
    inputs = make_inputs("disc", T=1000)
    check(run(inputs, "torch", reverse=reverse), run(inputs, "reference", reverse=reverse), 1e-12)


def test_a_million_tokens():
    ones = torch.ones(1, 2**20, 1)
    h, state = linear_scan(ones, ones, output_final_state=True)
    assert torch.equal(h[0, :, 0], torch.arange(1.0, 2**20 + 1))  # whole numbers below 2^24 are exact in float32
    assert state.item() == 2**20


def test_products_of_decays_that_underflow_are_exact():
    """Divided by products of decays, as in the textbook's form, this would be 0 / 0."""
    x, decay = torch.ones(1, 4096, 2), torch.full((1, 4096, 2), 1e-3)
    h, _ = linear_scan(x, decay)
    assert_close(h[:, 5:], torch.full((1, 4091, 2), 1 / (1 - 1e-3), dtype=torch.float64), 1e-7)


def test_a_decay_of_zero_forgets_exactly():
    inputs = make_inputs("uniform", T=300)
    inputs["decay"][:, 123] = 0
    whole, _ = linear_scan(**inputs)
    tail, _ = linear_scan(inputs["x"][:, 123:], inputs["decay"][:, 123:])
    assert_close(whole[:, 123:], tail, 1e-14)


PACKINGS = [[0, 1], [0, 5, 12], [0, 0, 3, 3, 3, 70, 71, 130, 130]]


@pytest.mark.parametrize("state", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bounds", PACKINGS, ids=str)
@pytest.mark.parametrize("decays", ["uniform", "circle"])
def test_packed_equals_separate(decays, bounds, reverse, state):
    inputs = make_inputs(decays, T=bounds[-1], B=1, states=len(bounds) - 1)
    if not state:
        del inputs["initial_state"]
    options = {"reverse": reverse, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    expected = run(inputs, "reference", **options)
    check(run(inputs, "torch", **options), expected, 1e-12)
    outputs, finals = [], []  # and the reference's packing against calls of their own
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = inputs["initial_state"][n : n + 1] if state else torch.zeros_like(inputs["x"][:, 0])
        if start < end:
            x, decay = (inputs[name][:, start:end] for name in ("x", "decay"))
            h, own = linear_scan(x, decay, initial_state=own, output_final_state=True, reverse=reverse)
            outputs.append(h)
        finals.append(own)
    close(torch.cat(outputs, dim=1), expected["h"], 1e-12)
    close(torch.cat(finals), expected["final state"], 1e-12)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_any_split_equals_one_call(reverse):
    inputs = make_inputs("disc", T=150)
    expected = run(inputs, "torch", reverse=reverse)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    state, outputs = leaves["initial_state"], []
    cuts = [(0, 1), (1, 64), (64, 70), (70, 150)]
    for start, stop in reversed(cuts) if reverse else cuts:
        part = [leaves[name][:, start:stop] for name in ("x", "decay")]
        h, state = linear_scan(*part, initial_state=state, output_final_state=True, reverse=reverse)
        outputs.append(h)
    h = torch.cat(outputs[::-1] if reverse else outputs, dim=1)
    random_loss(h, state).backward()
    check({"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}, expected, 1e-12)


@pytest.mark.parametrize("decays", ["negative", "disc"])
def test_steps_equal_the_whole(decays):
    inputs = make_inputs(decays, T=9)
    expected, expected_state = linear_scan(**inputs, output_final_state=True)
    state = inputs["initial_state"].clone()
    address = state.data_ptr()
    outputs = [linear_scan_step(inputs["x"][:, t], inputs["decay"][:, t], state) for t in range(9)]
    close(torch.stack(outputs, dim=1), expected, 1e-12, "outputs")
    close(state, expected_state, 1e-12, "state")
    assert state.data_ptr() == address


@pytest.mark.parametrize("decays", ["uniform", "disc"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradcheck(decays, packed):
    inputs = make_inputs(decays, T=7, B=1 if packed else 2, D=3, states=3 if packed else None)
    cu_seqlens = torch.tensor([0, 2, 2, 7]) if packed else None

    def function(x, decay, state):
        return linear_scan(x, decay, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in NAMES], fast_mode=True)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_bfloat16(packed):
    inputs = make_inputs("uniform", T=130, B=1)
    inputs = {name: x.bfloat16().double() for name, x in inputs.items()}
    options = {"cu_seqlens": torch.tensor([0, 130])} if packed else {}
    actual = run(single(inputs), "torch", torch.bfloat16, **options)
    assert actual["h"].dtype == torch.bfloat16
    assert actual["final state"].dtype == torch.float32
    check(actual, run(inputs, "reference", **options), 1e-2)


def test_a_decay_may_be_more_precise_than_x():
    x, decay = torch.ones(1, 2000, 1, dtype=torch.bfloat16), torch.full((1, 2000, 1), 0.999)
    _, state = linear_scan(x, decay, output_final_state=True)  # rounded to bfloat16 the decay would be 1
    assert_close(state, torch.tensor([[(1 - 0.999**2000) / (1 - 0.999)]]), 1e-4)


def test_gradients_of_either_output_alone_and_without_a_state():
    inputs = make_inputs("uniform", T=20)
    del inputs["initial_state"]
    for chosen in (0, 1):
        found = []
        for backend in ("torch", "reference"):
            leaves = [inputs[name].clone().requires_grad_() for name in ("x", "decay")]
            random_loss(linear_scan(*leaves, output_final_state=True, backend=backend)[chosen]).backward()
            found.append([leaf.grad for leaf in leaves])
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected, 1e-12)


def test_layouts_other_than_contiguous():
    inputs = make_inputs("disc", T=70)
    expected = run(inputs, "reference")
    strided = {name: inputs[name].mT.contiguous().mT for name in ("x", "decay")}
    strided["decay"] = strided["decay"].conj().resolve_conj().conj()  # with PyTorch's lazy conjugation
    close(linear_scan(**strided, initial_state=inputs["initial_state"])[0], expected["h"], 1e-12)
    constant = {"x": inputs["x"], "decay": inputs["decay"][:, :1].expand(-1, 70, -1)}
    close(linear_scan(**constant)[0], linear_scan(**constant, backend="reference")[0], 1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_the_op_changes_none_of_its_inputs(packed):
    inputs = make_inputs("disc", T=70, B=1)
    copies = {name: x.clone() for name, x in inputs.items()}
    linear_scan(**inputs, cu_seqlens=torch.tensor([0, 70]) if packed else None)
    for name, value in copies.items():
        assert torch.equal(inputs[name], value), name


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_compiles_without_a_graph_break(reverse, packed):
    inputs = make_inputs("uniform", T=30, B=1, states=2 if packed else 1)
    options = {"reverse": reverse, "cu_seqlens": torch.tensor([0, 12, 30]) if packed else None}
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    h, state = compiled(**leaves, output_final_state=True, **options)
    random_loss(h, state).backward()
    actual = {"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}
    check(actual, run(inputs, "torch", **options), 1e-12)


@pytest.mark.parametrize(("decays", "dtype"), [("uniform", torch.bfloat16), ("disc", torch.complex128)])
def test_custom_op_is_registered_faithfully(decays, dtype):
    inputs = make_inputs(decays, T=30)
    arguments = [inputs[name].to(dtype).requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.lm_zoo.linear_scan, (*arguments, None, True, "torch"))


def test_recurrence_of_rg_lru():
    """RecurrentGemma's own loop over time as the oracle, through its gates, resets at documents' borders included."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    generator = torch.Generator().manual_seed(0)
    x, gate, write, state = (
        torch.randn(*shape, generator=generator).double() for shape in ((2, 50, 8), (2, 50, 8), (2, 50, 8), (2, 8))
    )
    reset = torch.rand(2, 50, 1, generator=generator) < 0.1

    def rg_lru(scan, x, gate, write, strength):
        log_decay = -8 * F.softplus(strength) * gate.sigmoid()
        return scan(x * write.sigmoid() * (1 - (2 * log_decay).exp()).sqrt(), log_decay.exp())

    def ours(x, decay):
        return linear_scan(x, decay * ~reset, initial_state=state)[0]

    def theirs(x, decay):
        return RecurrentGemmaRglru._rnn_scan(None, x, decay, reset, state, torch.float64)[0]

    found = []
    for scan in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, write, torch.linspace(-3, 1, 8).double())]
        h = rg_lru(scan, *leaves)
        random_loss(h).backward()
        found.append([h, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, 1e-12)


def test_comparer_sees_a_wrong_decay():
    inputs = make_inputs("uniform", T=130)
    right = linear_scan(**inputs)[0]
    inputs["decay"] = inputs["decay"] * (1 - 1e-4)
    assert relative_error(linear_scan(**inputs)[0], right) > 2e-5


def bad(name, message="", **changes):
    return pytest.param(name, message, changes, id="-".join([name, *changes, message]))


SHAPE = (2, 5, 3)


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        bad("x", x=torch.zeros(5, 3)),
        bad("x", x=torch.zeros(SHAPE, dtype=torch.int64)),
        bad("x", "T = 0", x=torch.zeros(2, 0, 3), decay=torch.zeros(2, 0, 3)),
        bad("decay", decay=torch.zeros(2, 5, 4)),
        bad("decay", decay=torch.zeros(SHAPE, dtype=torch.complex64)),
        bad("decay", decay=0.5),
        bad("decay", decay=torch.zeros(SHAPE, device="meta")),
        bad("decay", "not its logarithm", decay=torch.full(SHAPE, -1.1)),
        bad("decay", "<= 1", x=torch.zeros(SHAPE) + 0j, decay=torch.full(SHAPE, 1.1j)),
        bad("initial_state", initial_state=torch.zeros(1, 3)),
        bad("initial_state", initial_state=torch.zeros(2, 3) + 0j),
        bad("initial_state", "finite", initial_state=torch.full((2, 3), torch.nan)),
        bad("cu_seqlens", "B must be 1", cu_seqlens=torch.tensor([0, 5])),
        bad("backend", backend="cuda"),
    ],
)
def test_bad_arguments_are_named(name, message, changes):
    arguments = {"x": torch.zeros(SHAPE), "decay": torch.zeros(SHAPE)} | changes
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*{message}"):
        linear_scan(**arguments)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5]])
def test_bad_sequence_borders_are_named(bounds):
    x = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=r"^cu_seqlens must"):
        linear_scan(x, x, cu_seqlens=torch.tensor(bounds))


def test_bad_steps_are_named():
    x, state = torch.zeros(2, 3), torch.zeros(2, 3)
    for name, arguments in {
        "x": (x[0], x, state),
        "decay": (x, x[:1], state),
        "state": (x, x, state.bfloat16()),
    }.items():
        with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
            linear_scan_step(*arguments)


def test_a_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in (torch.ones(1, 3, 2), torch.full((1, 3, 2), 0.5))]
    h, _ = linear_scan(*inputs)
    (dx, _) = torch.autograd.grad(h.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
