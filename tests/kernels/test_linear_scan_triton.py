"""The scan in Triton against the recurrence in float64: outputs, final states and every gradient.

On a machine without a GPU the kernels run in Triton's interpreter, element by element: everything is tiny.
"""

import itertools

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import linear_scan, linear_scan_step
from lm_zoo.kernels.backends import use_backend
from lm_zoo.kernels.linear_scan import triton_scan
from lm_zoo.kernels.linear_scan.chunks import cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = ["uniform", "negative", "zeros among ones", "disc"]
NAMES = ("x", "decay", "initial_state")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Chunks of two tiles, and so few channels that a token has several blocks."""
    for name, value in {"CHUNK": 8, "TILE": 4, "BLOCK": 2, "COMPLEX_BLOCK": 2}.items():
        monkeypatch.setattr(triton_scan, name, value)


def make_inputs(decays, *, T, B=1, D=3, states=None, seed=0):
    """In double precision, with values that are exact in single precision."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(B, T, D, generator=generator)
    decay = {
        "uniform": uniform,
        "negative": -uniform,
        "zeros among ones": (uniform > 0.2).float(),
        "disc": torch.polar(uniform, 6.3 * torch.rand(B, T, D, generator=generator)),
    }[decays]
    shapes = {"x": (B, T, D), "initial_state": (states or B, D)}
    drawn = {name: torch.randn(*shape, dtype=decay.dtype, generator=generator) for name, shape in shapes.items()}
    double = torch.promote_types(decay.dtype, torch.float64)
    return {name: (drawn | {"decay": decay})[name].to(DEVICE, double) for name in NAMES}


def cast(inputs, dtype):
    return {name: x.to(torch.complex64 if x.is_complex() else dtype) for name, x in inputs.items()}


def run(inputs, backend, **options):
    """Outputs, final state and gradients of a random linear loss."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    h, state = linear_scan(**leaves, output_final_state=True, backend=backend, **options)
    random_loss(h, state).backward()
    return {"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}


def random_loss(*outputs):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.complex128, generator=generator).to(DEVICE) for x in outputs]
    return sum((x.to(torch.complex128) * weight).sum().real for x, weight in zip(outputs, weights, strict=True))


def check(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        parts = [torch.view_as_real(x.detach()) if x.is_complex() else x for x in (actual[name], value)]
        assert_close(*parts, tolerance, name)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("T", [1, 27])
def test_matches_the_recurrence(T, decays, reverse):
    inputs = make_inputs(decays, T=T)
    actual = run(cast(inputs, torch.float32), "triton", reverse=reverse)
    assert actual["h"].dtype == actual["final state"].dtype == (torch.complex64 if decays == "disc" else torch.float32)
    check(actual, run(inputs, "reference", reverse=reverse), 1e-6)


@pytest.mark.parametrize("bounds", [[0, 1], [0, 0, 3, 3, 22, 23, 23]], ids=str)
@pytest.mark.parametrize(("decays", "reverse"), [("uniform", False), ("uniform", True), ("disc", True)])
def test_packed(decays, bounds, reverse):
    inputs = make_inputs(decays, T=bounds[-1], D=2, states=len(bounds) - 1)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE), "reverse": reverse}
    check(run(cast(inputs, torch.float32), "triton", **options), run(inputs, "reference", **options), 1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_without_states(packed):
    inputs = make_inputs("uniform", T=20)
    del inputs["initial_state"]
    options = {"cu_seqlens": torch.tensor([0, 11, 20], device=DEVICE) if packed else None}
    check(run(cast(inputs, torch.float32), "triton", **options), run(inputs, "reference", **options), 1e-6)
    leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
    assert linear_scan(**leaves, backend="triton", **options)[1] is None


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_any_split_equals_one_call(reverse):
    inputs = cast(make_inputs("disc", T=27), torch.float32)
    expected, expected_state = linear_scan(**inputs, output_final_state=True, reverse=reverse, backend="triton")
    state, outputs = inputs["initial_state"], {}
    cuts = [(0, 1), (1, 9), (9, 27)]
    for start, stop in reversed(cuts) if reverse else cuts:
        part = [inputs[name][:, start:stop] for name in ("x", "decay")]
        options = {"initial_state": state, "reverse": reverse, "backend": "triton"}
        outputs[start], state = linear_scan(*part, output_final_state=True, **options)
    h = torch.cat([outputs[start] for start, _ in cuts], dim=1)
    check({"h": h, "state": state}, {"h": expected, "state": expected_state}, 1e-6)


def test_a_decay_of_zero_forgets_exactly():
    inputs = cast(make_inputs("uniform", T=27), torch.float32)
    inputs["decay"][:, 13] = 0
    inputs["x"][:, 5] = 1e30
    whole, _ = linear_scan(**inputs, backend="triton")
    tail, _ = linear_scan(inputs["x"][:, 13:], inputs["decay"][:, 13:], backend="triton")
    assert_close(whole[:, 13:], tail.double(), 1e-6)


def test_half_precision():
    """The decay may be more precise than x."""
    inputs = make_inputs("uniform", T=20)
    inputs["x"] = inputs["x"].half().double()
    halves = cast(inputs, torch.float32) | {"x": inputs["x"].half()}
    actual = run(halves, "triton")
    assert actual["h"].dtype == torch.float16
    assert actual["final state"].dtype == torch.float32
    check(actual, run(inputs, "reference"), 1e-3)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bitwise_the_same_alone_and_in_a_batch(reverse):
    """Outputs and the gradients of x and the decay, in chunks that start where the sequence does."""
    inputs = cast(make_inputs("negative", T=11, B=2, D=2), torch.float32)
    batch = run_ones(inputs, reverse=reverse)
    packed = {name: x.flatten(0, 1)[None] if name != "initial_state" else x for name, x in inputs.items()}
    together = run_ones(packed, reverse=reverse, cu_seqlens=torch.tensor([0, 11, 22], device=DEVICE))
    alone = run_ones({name: x[1:] for name, x in inputs.items()}, reverse=reverse)
    for name, value in batch.items():
        assert torch.equal(together[name].view(value.shape), value), name
        assert torch.equal(alone[name], value[1:]), name


def run_ones(inputs, **options):
    """Of a loss that does not know what else is in the batch."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    h, state = linear_scan(**leaves, output_final_state=True, backend="triton", **options)
    (h.sum() + state.sum()).backward()
    return {"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}


@pytest.mark.parametrize("decays", ["negative", "disc"])
def test_steps_equal_the_whole(decays):
    inputs = make_inputs(decays, T=5, B=2)
    expected, expected_state = linear_scan(**inputs, output_final_state=True, backend="reference")
    inputs = cast(inputs, torch.float32)
    kept = torch.zeros(2, 3, 7, dtype=inputs["x"].dtype, device=DEVICE)
    state = kept[:, :, 2]  # a view of a larger cache
    state.copy_(inputs["initial_state"])
    with use_backend("triton"):
        outputs = [linear_scan_step(inputs["x"][:, t], inputs["decay"][:, t], state) for t in range(5)]
    check({"h": torch.stack(outputs, dim=1), "state": state}, {"h": expected, "state": expected_state}, 1e-6)
    assert torch.equal(kept[:, :, 2], state)
    assert kept[:, :, :2].abs().sum() == kept[:, :, 3:].abs().sum() == 0


def test_lazily_conjugated_and_strided_inputs():
    inputs = make_inputs("disc", T=9)
    expected, _ = linear_scan(**inputs, backend="reference")
    strided = {name: x.mT.contiguous().mT for name, x in cast(inputs, torch.float32).items()}
    strided["decay"] = strided["decay"].conj().resolve_conj().conj()
    h, _ = linear_scan(**strided, backend="triton")
    check({"h": h}, {"h": expected}, 1e-6)


def test_compiles_without_a_graph_break():
    inputs = cast(make_inputs("uniform", T=10), torch.float32)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    h, state = compiled(**leaves, output_final_state=True, backend="triton")
    random_loss(h, state).backward()
    actual = {"h": h, "final state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}
    check(actual, run(inputs, "triton"), 1e-6)


def test_double_precision_is_refused():
    inputs = make_inputs("disc", T=2)
    with pytest.raises(ValueError, match="float64"):
        linear_scan(**inputs, backend="triton")


@pytest.mark.parametrize("bounds", [[0, 9], [0, 0, 3, 3, 8, 17, 17], [0, 16, 32]], ids=str)
def test_chunks_of_packed_sequences(bounds):
    chunks = cut(1, bounds[-1], torch.tensor(bounds), 8)
    expected = [n for n, (start, end) in enumerate(itertools.pairwise(bounds)) for _ in range(start, end, 8)]
    assert chunks.sequence_of.tolist()[: len(expected)] == expected
    assert chunks.first_chunk.tolist() == [sum(m < n for m in expected) for n in range(len(bounds))]
    assert len(expected) <= chunks.count == len(chunks.sequence_of)
    assert max(expected.count(n) for n in expected) <= chunks.per_sequence


def test_chunks_are_found_without_a_look_at_the_borders():
    """Tensors without contents: anything that waits for the device to read them would raise."""
    assert cut(1, 100, torch.empty(4, dtype=torch.int32, device="meta"), 8).count == 15
