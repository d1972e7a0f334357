"""The scan in Triton against the recurrence in float64: outputs, final states and every gradient.

On a machine without a GPU the kernels run in Triton's interpreter, element by element: everything is tiny.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from compare import assert_close, relative_error

from lm_zoo.kernels import linear_scan, linear_scan_step
from lm_zoo.kernels.backends import use_backend
from lm_zoo.kernels.linear_scan import triton_scan

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
@pytest.mark.parametrize("T", [1, 8, 43])
def test_matches_the_recurrence(T, decays, reverse):
    inputs = make_inputs(decays, T=T)
    actual = run(cast(inputs, torch.float32), "triton", reverse=reverse)
    assert actual["h"].dtype == actual["final state"].dtype == (torch.complex64 if decays == "disc" else torch.float32)
    check(actual, run(inputs, "reference", reverse=reverse), 1e-6)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 0, 3, 3, 3, 22, 23, 41, 41]], ids=str)
@pytest.mark.parametrize("decays", ["uniform", "disc"])
def test_packed(decays, bounds, reverse):
    inputs = make_inputs(decays, T=bounds[-1], states=len(bounds) - 1)
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
