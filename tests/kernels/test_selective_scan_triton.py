"""The selective scan in Triton against the recurrence in float64: outputs, final states and every gradient.

On a machine without a GPU the kernels run in Triton's interpreter, element by element: everything is tiny.
"""

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import selective_scan, selective_scan_step
from lm_zoo.kernels.backends import use_backend
from lm_zoo.kernels.linear_scan import triton_scan as linear
from lm_zoo.kernels.selective_scan import triton_backward, triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
OPTIONAL = ("D", "z", "initial_state")
HALVES = ("x", "B", "C", "z")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Chunks of two tiles, and so few channels in a program that a token has several, in several groups."""
    for name, value in {"TILE": 2, "BLOCK": 8}.items():
        monkeypatch.setattr(linear, name, value)
    tile = triton_scan.Tile(4, 8, 1)
    for module, name, value in ((triton_scan, "FORWARD", tile), (triton_backward, "BACKWARD", {256: tile})):
        monkeypatch.setattr(module, "CHUNK", 8)
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(triton_backward, "GROUP", 4)


def make_inputs(*, T, B=1, D=5, N=3, states=None, without=(), fastest=-4.0, seed=0):
    """In float64, with values that are exact in float32. Step sizes go up to 2; `fastest` is the lowest A."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"dt": (B, T, D), "A": (D, N), "x": (B, T, D), "B": (B, T, N), "C": (B, T, N), "D": (D,), "z": (B, T, D)}
    shapes["initial_state"] = (states or B, D, N)
    inputs = {}
    for name, shape in shapes.items():
        draw = torch.rand if name in ("dt", "A") else torch.randn
        scale = {"dt": 2.0, "A": fastest}.get(name, 1.0)
        inputs[name] = (scale * draw(*shape, generator=generator)).to(DEVICE, torch.float64)
    return {name: None if name in without else inputs[name] for name in NAMES}


def cast(inputs, dtype, names=NAMES):
    return {name: x.to(dtype) if name in names and x is not None else x for name, x in inputs.items()}


def run(inputs, backend="triton", function=selective_scan, **options):
    """Outputs, final state and gradients of a random linear loss."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = function(**leaves, output_final_state=True, backend=backend, **options)
    random_loss(y, state).backward()
    return {"y": y, "state": state, **{f"d{name}": x.grad for name, x in leaves.items() if x is not None}}


def random_loss(*outputs):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(DEVICE, torch.float64) for x in outputs]
    return sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))


def check(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
@pytest.mark.parametrize("T", [1, 19])
def test_matches_the_recurrence(T, without):
    inputs = make_inputs(T=T, without=without)
    actual = run(cast(inputs, torch.float32))
    assert actual["y"].dtype == actual["state"].dtype == torch.float32
    check(actual, run(inputs, "reference"), 1e-6)


@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
def test_packed(without):
    bounds = [0, 0, 5, 5, 19, 20, 20]
    inputs = make_inputs(T=20, D=2, states=6, without=without)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    check(
        run(cast(inputs, torch.float32), cu_seqlens=cu_seqlens), run(inputs, "reference", cu_seqlens=cu_seqlens), 1e-6
    )


@pytest.mark.parametrize("without", [("D",), ("z",)], ids=str)
def test_each_option_on_its_own(without):
    inputs = make_inputs(T=5, D=2, without=without)
    check(run(cast(inputs, torch.float32)), run(inputs, "reference"), 1e-6)


@pytest.mark.parametrize("fastest", [0.0, -60.0, -1e4])
def test_slow_and_fast_decays(fastest):
    """From no decay at all to states that underflow within a token."""
    inputs = make_inputs(T=10, D=2, fastest=fastest)
    inputs["A"][:, 0] = -0.1
    check(run(cast(inputs, torch.float32)), run(inputs, "reference"), 1e-5)


def test_any_split_equals_one_call():
    inputs = cast(make_inputs(T=19, D=2), torch.float32)
    expected, expected_state = selective_scan(**inputs, output_final_state=True, backend="triton")
    outputs, state = [], inputs["initial_state"]
    for start, stop in ((0, 1), (1, 9), (9, 19)):
        part = {name: x[:, start:stop] if name in ("x", "dt", "B", "C", "z") else x for name, x in inputs.items()}
        y, state = selective_scan(**part | {"initial_state": state}, output_final_state=True, backend="triton")
        outputs.append(y)
    check({"y": torch.cat(outputs, dim=1), "state": state}, {"y": expected, "state": expected_state}, 1e-6)


def test_half_precision():
    inputs = cast(cast(make_inputs(T=10, D=2), torch.float16, HALVES), torch.float64)
    actual = run(cast(cast(inputs, torch.float32), torch.float16, HALVES))
    assert actual["y"].dtype == torch.float16
    assert actual["state"].dtype == torch.float32
    check(actual, run(inputs, "reference"), 2e-3)


def test_bitwise_the_same_alone_and_in_a_batch():
    inputs = cast(make_inputs(T=10, B=2, D=2), torch.float32)
    rows = ("x", "dt", "B", "C", "z")
    packed = {name: x.flatten(0, 1)[None] if name in rows else x for name, x in inputs.items()}
    single = {name: x[1:] if name in (*rows, "initial_state") else x for name, x in inputs.items()}
    batch, alone = run_ones(inputs), run_ones(single)
    together = run_ones(packed, cu_seqlens=torch.tensor([0, 10, 20], device=DEVICE))
    for name, value in batch.items():
        assert torch.equal(together[name].view(value.shape), value), name
        assert torch.equal(alone[name], value[1:]), name


def run_ones(inputs, **options):
    """Of a loss that does not know what else is in the batch; without the gradients that are summed over it."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y, state = selective_scan(**leaves, output_final_state=True, backend="triton", **options)
    (y.sum() + state.sum()).backward()
    return {"y": y, "state": state, **{name: leaves[name].grad for name in NAMES if name not in ("A", "D")}}


def test_bitwise_the_same_with_and_without_gradients():
    inputs = cast(make_inputs(T=10, D=2), torch.float32)
    assert torch.equal(selective_scan(**inputs, backend="triton")[0], run(inputs)["y"])


@pytest.mark.parametrize("without", [(), ("D", "z")], ids=["full", "bare"])
def test_steps_equal_the_whole(without):
    inputs = make_inputs(T=4, B=2, without=without)
    expected, expected_state = selective_scan(**inputs, output_final_state=True, backend="reference")
    x, dt, A, B, C, D, z, first = cast(inputs, torch.float32).values()
    kept = torch.zeros(3, *first.shape[1:2], 4, device=DEVICE)
    state = kept[1:, :, :3]  # a view of a larger cache
    state.copy_(first)
    outputs = []
    with use_backend("triton"):
        for t in range(4):
            gate = None if z is None else z[:, t]
            outputs.append(selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, state))
    check({"y": torch.stack(outputs, dim=1), "state": state}, {"y": expected, "state": expected_state}, 1e-6)
    assert kept[0].abs().sum() == kept[:, :, 3].abs().sum() == 0


def test_compiles_without_a_graph_break():
    inputs = cast(make_inputs(T=5, D=2), torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    check(run(inputs, function=compiled), run(inputs), 1e-6)


@pytest.mark.parametrize(("dtype", "N", "reason"), [(torch.float64, 3, "float64"), (torch.float32, 300, "N = 256")])
def test_what_is_unsupported_is_said(dtype, N, reason):
    inputs = cast(make_inputs(T=2, D=2, N=N), dtype)
    with pytest.raises(ValueError, match=reason):
        selective_scan(**inputs, backend="triton")
