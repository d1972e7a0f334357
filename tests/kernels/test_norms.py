"""The norms against their equations in float64, in PyTorch and in Triton: outputs and every gradient."""

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import l2_norm, rms_norm
from lm_zoo.kernels.norms import triton_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]


def make(*shape, seed=0):
    """Float64 x, weight and gate whose values are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": shape, "weight": shape[-1:], "gate": shape}
    return {name: torch.randn(*s, generator=generator).double().to(DEVICE) for name, s in shapes.items()}


def equation(x, weight=None, gate=None, *, eps, backend=None):
    """The RMS norm, or without a weight the L2 norm."""
    square = x.square()
    y = x / ((square.sum(-1, keepdim=True) if weight is None else square.mean(-1, keepdim=True)) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if gate is None else y * gate * gate.sigmoid()


def run(function, inputs, dtype, **options):
    """The output, and the gradients of the sum of its cubes."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **options)
    y.double().pow(3).sum().backward()
    return {"y": y} | {f"d{name}": x.grad for name, x in leaves.items()}


def check(function, inputs, tolerance=1e-5, dtype=torch.float32, eps=1e-5, **options):
    expected = run(equation, inputs, torch.float64, eps=eps)
    for name, value in run(function, inputs, dtype, eps=eps, **options).items():
        assert_close(value, expected[name], tolerance, name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in a run and several runs, the last of each not full."""
    monkeypatch.setattr(triton_norms, "BLOCK", 32)
    monkeypatch.setattr(triton_norms, "RUN", 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 20), (1, 2), (3, 1000)])
def test_rms_norm(shape, gated, backend, small_tiles):
    inputs = make(*shape)
    if not gated:
        del inputs["gate"]
    check(rms_norm, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 20), (1, 2)])
def test_l2_norm(shape, backend, small_tiles):
    check(l2_norm, {"x": make(*shape)["x"]}, eps=0.1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_stays_zero_with_finite_gradients(backend):
    inputs = make(2, 3, 8)
    inputs["x"][0] = 0
    check(rms_norm, inputs, backend=backend)
    check(l2_norm, {"x": inputs["x"]}, backend=backend)
    assert not l2_norm(inputs["x"].float(), backend=backend)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rounds_once(backend):
    inputs = {name: x.half().double() for name, x in make(5, 24).items()}
    check(rms_norm, inputs, tolerance=2e-3, dtype=torch.float16, backend=backend)
    x, weight = inputs["x"].half(), make(5, 24, seed=1)["weight"].float()
    y = rms_norm(x, weight, eps=1e-5, backend=backend)  # a float32 weight, as in mixed precision
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, equation(x.double(), weight.double(), eps=1e-5).half(), rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_larger_tensors(backend):
    inputs = {name: x.float() for name, x in make(4, 6, 8).items()}
    expected = equation(**inputs, eps=1e-5)
    views = {name: torch.cat([x, x], dim=-1)[..., :8] for name, x in inputs.items()}
    assert_close(rms_norm(**views, eps=1e-5, backend=backend), expected, 1e-6)
    turned = {"x": inputs["x"].mT.contiguous().mT, "weight": inputs["weight"]}
    assert_close(rms_norm(**turned, eps=1e-5, backend=backend), equation(inputs["x"], inputs["weight"], eps=1e-5), 1e-6)


def test_rows_alone_and_in_a_batch_bitwise_the_same(small_tiles):
    inputs = make(9, 8)
    alone = {name: x if name == "weight" else x[4:5] for name, x in inputs.items()}
    together, alone = (run(rms_norm, x, torch.float32, eps=1e-5, backend="triton") for x in (inputs, alone))
    for name in ("y", "dx", "dgate"):
        assert torch.equal(together[name][4:5], alone[name]), name


def test_no_rows():
    for backend in BACKENDS:
        x, weight = torch.zeros(0, 8, requires_grad=True, device=DEVICE), torch.ones(8, device=DEVICE)
        weight.requires_grad_()
        rms_norm(x, weight, eps=1e-5, backend=backend).sum().backward()
        assert not weight.grad.any()
        assert l2_norm(x, backend=backend).shape == (0, 8)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
def test_compiles_whole():
    inputs = {name: x.float() for name, x in make(4, 8).items()}

    def call(x, weight, gate):
        return rms_norm(l2_norm(x), weight, gate, eps=1e-5)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_close(compiled(**inputs), call(**inputs), 1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "^x must have one of the dtypes"),
        ({"weight": torch.zeros(5)}, ValueError, r"^weight must be \[D\] = \[6\], got \[5\]"),
        ({"weight": 1.0}, TypeError, "^weight must be a tensor"),
        ({"gate": torch.zeros(2, 5)}, ValueError, r"^gate must be as x = \[2, 6\], got \[2, 5\]"),
        ({"gate": torch.zeros(2, 6, device="meta")}, ValueError, "^gate is on meta"),
        ({"backend": "cuda"}, ValueError, "^backend must be one of"),
        ({"x": torch.zeros(2, 6).double(), "backend": "triton"}, ValueError, "cannot run here"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(6), "eps": 1e-5, **changes}
    with pytest.raises(error, match=message):
        rms_norm(**arguments)
