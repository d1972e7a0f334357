"""The scan over segments against the recurrence in float64: outputs, final states and every gradient."""

import itertools

import pytest
import torch
from compare import assert_close, relative_error
from torch.profiler import ProfilerActivity, profile

from lm_zoo.kernels import selective_scan, selective_scan_step
from lm_zoo.kernels.selective_scan import runs

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
OPTIONAL = ("D", "z", "initial_state")


def make_inputs(*, T, batch=2, D=6, N=4, states=None, without=(), fastest=-4.0, seed=0):
    """In float64, with values that are exact in float32. Step sizes go up to 2; `fastest` is the lowest A."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    dt = 2 * torch.rand(batch, T, D, generator=generator).double()
    A = fastest * torch.rand(D, N, generator=generator).double()
    per_channel, per_state, state = (batch, T, D), (batch, T, N), (states or batch, D, N)
    tensors = (draw(*per_channel), dt, A, draw(*per_state), draw(*per_state), draw(D), draw(*per_channel), draw(*state))
    return {name: None if name in without else tensor for name, tensor in zip(NAMES, tensors, strict=True)}


def run(inputs, backend="torch", function=selective_scan, **options):
    """Outputs, final state and gradients of a random linear loss."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = function(**leaves, output_final_state=True, backend=backend, **options)
    return gradients(leaves, y, state)


def gradients(leaves, y, state):
    random_loss(y, state).backward()
    return {"y": y, "state": state, **{f"d{name}": x.grad for name, x in leaves.items() if x is not None}}


def random_loss(*outputs):
    generator = torch.Generator().manual_seed(1)
    return sum((x.double() * torch.randn(x.shape, generator=generator).double()).sum() for x in outputs)


def check(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


def cast(inputs, dtype, names=NAMES):
    return {name: x.to(dtype) if name in names and x is not None else x for name, x in inputs.items()}


@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
@pytest.mark.parametrize("T", [1, 5, 31, 32, 33, 63, 64, 65, 130, 1000])
def test_matches_the_recurrence(T, without):
    inputs = make_inputs(T=T, without=without)
    expected = run(inputs, "reference")
    check(run(inputs), expected, 1e-12)
    actual = run(cast(inputs, torch.float32))
    assert actual["y"].dtype == actual["state"].dtype == torch.float32
    check(actual, expected, 1e-5)


@pytest.mark.parametrize("without", [("D",), ("z",), ("initial_state",)], ids=str)
def test_each_option_on_its_own(without):
    inputs = make_inputs(T=40, without=without)
    check(run(inputs), run(inputs, "reference"), 1e-12)


@pytest.mark.parametrize(("elements", "channels"), [(1, 1), (12, 2), (30, 4), (48, 6), (100, 6)])
def test_blocks_of_rows_and_channels(elements, channels, monkeypatch):
    """Also where they do not divide."""
    monkeypatch.setattr(runs, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(runs, "MIN_CHANNELS", channels)
    inputs = make_inputs(T=70, batch=5)
    assert len(runs.cut_runs(inputs["x"], 4, None)) > 1
    check(run(inputs), run(inputs, "reference"), 1e-12)
    packed = make_inputs(T=70, batch=1, states=2)
    options = {"cu_seqlens": torch.tensor([0, 33, 70])}
    check(run(packed, **options), run(packed, "reference", **options), 1e-12)


@pytest.mark.parametrize("fastest", [0.0, -0.01, -60.0, -1e4])
def test_slow_and_fast_decays(fastest):
    """From no decay at all to states that underflow within a token."""
    inputs = make_inputs(T=130, fastest=fastest)
    check(run(inputs), run(inputs, "reference"), 1e-12)
    check(run(cast(inputs, torch.float32)), run(inputs, "reference"), 1e-5)


def test_a_step_size_of_zero_keeps_the_state():
    inputs = make_inputs(T=40)
    inputs["dt"][:, 20:] = 0
    state = selective_scan(**inputs, output_final_state=True)[1]
    before = {name: x[:, :20] if name in ("x", "dt", "B", "C", "z") else x for name, x in inputs.items()}
    assert torch.equal(state, selective_scan(**before, output_final_state=True)[1])


PACKINGS = [[0, 1], [0, 5, 12], [0, 0, 3, 3, 3, 70, 71, 130, 130]]


@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
@pytest.mark.parametrize("bounds", PACKINGS, ids=str)
def test_packed_equals_separate(bounds, without):
    inputs = make_inputs(T=bounds[-1], batch=1, states=len(bounds) - 1, without=without)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    expected = run(inputs, "reference", cu_seqlens=cu_seqlens)
    check(run(inputs, cu_seqlens=cu_seqlens), expected, 1e-12)

    def separate(x, dt, A, B, C, D, z, initial_state, **options):
        outputs, states = [], []
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            state = None if initial_state is None else initial_state[n : n + 1]
            part = [None if tensor is None else tensor[:, start:end] for tensor in (x, dt, B, C, z)]
            if start < end:
                y, state = selective_scan(*part[:2], A, *part[2:4], D, part[4], initial_state=state, **options)
                outputs.append(y)
            states.append(torch.zeros(1, *A.shape, dtype=A.dtype) if state is None else state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    check(run(inputs, function=separate), expected, 1e-12)


def test_any_split_equals_one_call():
    inputs = make_inputs(T=150)

    def split(x, dt, A, B, C, D, z, initial_state, **options):
        outputs, state = [], initial_state
        for start, stop in ((0, 1), (1, 64), (64, 70), (70, 150)):
            x_n, dt_n, B_n, C_n, z_n = (tensor[:, start:stop] for tensor in (x, dt, B, C, z))
            y, state = selective_scan(x_n, dt_n, A, B_n, C_n, D, z_n, initial_state=state, **options)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    check(run(inputs, function=split), run(inputs), 1e-12)


@pytest.mark.parametrize("without", [(), ("D", "z")], ids=["full", "bare"])
def test_steps_equal_the_whole(without):
    inputs = make_inputs(T=9, without=without)
    expected, expected_state = selective_scan(**inputs, output_final_state=True)
    x, dt, A, B, C, D, z, state = (None if tensor is None else tensor.clone() for tensor in inputs.values())
    address, outputs = state.data_ptr(), []
    for t in range(9):
        gate = None if z is None else z[:, t]
        outputs.append(selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, state))
    assert_close(torch.stack(outputs, dim=1), expected, 1e-12, "outputs")
    assert_close(state, expected_state, 1e-12, "state")
    assert state.data_ptr() == address


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
def test_gradcheck(without, packed):
    inputs = make_inputs(T=35, batch=1 if packed else 2, D=3, N=2, states=3 if packed else None, without=without)
    inputs["A"] -= 0.1  # finite differences may not step above 0
    inputs["dt"] += 0.1
    names = [name for name, x in inputs.items() if x is not None]
    options = {"output_final_state": True, "cu_seqlens": torch.tensor([0, 33, 33, 35]) if packed else None}

    def function(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names], fast_mode=True)


def test_gradients_of_either_output_alone():
    inputs = make_inputs(T=40)
    for chosen in (0, 1):
        found = []
        for backend in ("torch", "reference"):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            output = selective_scan(**leaves, output_final_state=True, backend=backend)[chosen]
            used = [leaf for name, leaf in leaves.items() if chosen == 0 or name not in ("C", "D", "z")]
            found.append(torch.autograd.grad(random_loss(output), used))
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("names", [NAMES, ("x", "B", "C", "z")], ids=["all", "all but dt, A, D"])
def test_bfloat16(names):
    inputs = cast(cast(make_inputs(T=130), torch.bfloat16, names), torch.float64)
    single = cast(inputs, torch.float32)
    actual = run(cast(single, torch.bfloat16, [name for name in names if name != "initial_state"]))
    assert actual["y"].dtype == torch.bfloat16
    assert actual["state"].dtype == torch.float32
    check(actual, run(inputs, "reference"), 1e-2)


def test_autocast_leaves_the_states_alone():
    inputs = cast(make_inputs(T=70), torch.float32)
    expected = run(inputs, "reference")
    with torch.autocast("cpu", torch.bfloat16):  # around the backward pass as well
        check(run(inputs), expected, 1e-5)
        x, dt, A, B, C, D, z, state = (tensor.clone() for tensor in inputs.values())
        y = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], state)
    assert_close(y, expected["y"][:, 0], 1e-5)


def test_layouts_other_than_contiguous():
    inputs = make_inputs(T=70)
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    check(run(strided), run(inputs, "reference"), 1e-12)
    expanded = inputs | {"dt": inputs["dt"][:, :1].expand(-1, 70, -1)}
    check(run(expanded), run(expanded, "reference"), 1e-12)


def test_the_op_changes_none_of_its_inputs():
    inputs = make_inputs(T=70)
    copies = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    gradients(leaves, *selective_scan(**leaves, output_final_state=True))
    for name, value in copies.items():
        assert torch.equal(inputs[name].detach(), value), name


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_compiles_without_a_graph_break(packed):
    inputs = make_inputs(T=70, batch=1, states=2 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 30, 70]) if packed else None}
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    check(run(inputs, "auto", compiled, **options), run(inputs, **options), 1e-12)


@pytest.mark.parametrize(("without", "dtype"), [((), torch.float64), (OPTIONAL, torch.bfloat16)], ids=["full", "bare"])
def test_custom_op_is_registered_faithfully(without, dtype):
    inputs = cast(make_inputs(T=40, without=without), dtype)
    arguments = [None if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(torch.ops.lm_zoo.selective_scan, (*arguments, None, True, "torch"))


def transformers_scan(x, dt, A, B, C, D, z):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, B, C, z = (tensor.transpose(1, 2) for tensor in (x, dt, B, C, z))
    y, state = mamba_selective_scan(x, dt, A, B, C, D, z, return_last_state=True)
    return y.transpose(1, 2), state


def test_matches_transformers():
    inputs = cast(make_inputs(T=70, batch=2, D=8, without=["initial_state"]), torch.float32)  # all that theirs takes
    del inputs["initial_state"]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = gradients(leaves, *transformers_scan(**leaves))
    check(run(inputs), expected, 1e-5)


def memory(function):
    """The largest tensor that was made meanwhile, and the most that was held at a time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    return max(sizes), max(itertools.accumulate(sizes))


def test_no_tensor_has_a_state_per_token():
    inputs = cast(make_inputs(T=1024, batch=1, D=128, N=32, without=["initial_state"]), torch.float32)
    del inputs["initial_state"]
    whole = 1024 * 128 * 32 * 4
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = torch.ones_like(inputs["x"])
    largest, most = memory(lambda: torch.autograd.grad(selective_scan(**leaves)[0], leaves.values(), y))
    assert largest <= whole / 16
    assert most <= whole / 3
    largest, most = memory(lambda: transformers_scan(**inputs))  # which has such tensors: the measure sees them
    assert largest >= whole
    assert most >= 2 * whole


def test_comparer_sees_a_wrong_decay():
    inputs = make_inputs(T=130)
    right = selective_scan(**inputs)[0]
    inputs["A"] = inputs["A"] * (1 + 1e-3)
    assert relative_error(selective_scan(**inputs)[0], right) > 2e-5


def bad(name, message="", **changes):
    return pytest.param(name, message, changes, id="-".join([name, *changes, message]))


ZEROS = {"x": (2, 5, 3), "dt": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4)}


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        bad("x", x=torch.zeros(5, 3)),
        bad("x", x=torch.zeros(2, 5, 3, dtype=torch.complex64)),
        bad("x", "T = 0", x=torch.zeros(2, 0, 3)),
        bad("dt", dt=torch.zeros(2, 5, 1)),
        bad("dt", "softplus", dt=torch.full((2, 5, 3), -0.1)),
        bad("A", A=torch.zeros(4, 4)),
        bad("A", "N >= 1", A=torch.zeros(3, 0)),
        bad("A", "A_log", A=torch.full((3, 4), 0.1)),
        bad("B", B=torch.zeros(2, 5, 3)),
        bad("B", B=None),
        bad("C", C=torch.zeros(2, 5, 4, dtype=torch.float64)),
        bad("C", C=torch.zeros(2, 5, 4, device="meta")),
        bad("D", D=torch.zeros(4)),
        bad("D", D=1.0),
        bad("z", z=torch.zeros(2, 5)),
        bad("initial_state", initial_state=torch.zeros(1, 3, 4)),
        bad("initial_state", "finite", initial_state=torch.full((2, 3, 4), torch.inf)),
        bad("cu_seqlens", "B must be 1", cu_seqlens=torch.tensor([0, 5])),
        bad("backend", backend="cuda"),
    ],
)
def test_bad_arguments_are_named(name, message, changes):
    arguments = {name: torch.zeros(shape) for name, shape in ZEROS.items()} | changes
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*{message}"):
        selective_scan(**arguments)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5]])
def test_bad_sequence_borders_are_named(bounds):
    arguments = {name: torch.zeros(shape) for name, shape in ZEROS.items()}
    arguments = {name: x if name == "A" else x[:1] for name, x in arguments.items()}
    with pytest.raises(ValueError, match=r"^cu_seqlens must"):
        selective_scan(**arguments, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(3)}),
        ("dt", {"dt": torch.zeros(1, 3)}),
        ("A", {"A": torch.zeros(2, 4)}),
        ("C", {"C": torch.zeros(2, 3)}),
        ("D", {"D": torch.zeros(2)}),
        ("z", {"z": torch.zeros(2, 3).bfloat16()}),
        ("state", {"state": torch.zeros(2, 3, 4).bfloat16()}),
        ("state", {"state": torch.zeros(2, 4, 3)}),
    ],
)
def test_bad_steps_are_named(name, changes):
    shapes = {"x": (2, 3), "dt": (2, 3), "A": (3, 4), "B": (2, 4), "C": (2, 4), "state": (2, 3, 4)}
    arguments = {"D": None, "z": None} | {name: torch.zeros(shape) for name, shape in shapes.items()} | changes
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        selective_scan_step(**arguments)
