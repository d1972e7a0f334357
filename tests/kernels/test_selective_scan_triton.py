"""The selective scan in Triton against the recurrence in float64: outputs, final states and every gradient.

On a machine without a GPU the kernels run in Triton's interpreter, element by element: everything is tiny.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from compare import assert_close, relative_error

from lm_zoo.kernels import selective_scan, selective_scan_step
from lm_zoo.kernels.backends import use_backend
from lm_zoo.kernels.selective_scan import triton_backward, triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
OPTIONAL = ("D", "z", "initial_state")
HALVES = ("x", "B", "C", "z")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Forward chunks of two tiles, and so few channels in a program that a token has several, in several groups."""
    tile = triton_scan.Tile(4, 8, 1)
    monkeypatch.setattr(triton_scan, "CHUNK", 8)
    monkeypatch.setattr(triton_scan, "FORWARD", tile)
    monkeypatch.setattr(triton_backward, "BACKWARD", {256: tile})
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
@pytest.mark.parametrize("T", [1, 8, 27])
def test_matches_the_recurrence(T, without):
    inputs = make_inputs(T=T, without=without)
    actual = run(cast(inputs, torch.float32))
    assert actual["y"].dtype == actual["state"].dtype == torch.float32
    check(actual, run(inputs, "reference"), 1e-6)


@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["full", "bare"])
def test_packed(without):
    bounds = [0, 0, 3, 3, 3, 20, 21, 29, 29]
    inputs = make_inputs(T=29, states=8, without=without)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    check(
        run(cast(inputs, torch.float32), cu_seqlens=cu_seqlens), run(inputs, "reference", cu_seqlens=cu_seqlens), 1e-6
    )
