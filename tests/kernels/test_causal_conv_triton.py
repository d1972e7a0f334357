"""The Triton convolution against the PyTorch one in float64: outputs, states and every gradient."""

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import causal_conv1d
from lm_zoo.kernels.causal_conv import triton_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs, and several blocks in a program's run, at the sizes of these tests."""
    for name, size in {"BLOCK_T": 8, "BACKWARD_BLOCK_T": 4, "BLOCK_D": 8, "STEP_BLOCK_D": 8, "RUN": 8}.items():
        monkeypatch.setattr(triton_conv, name, size)


def make(*, T, B=1, D=9, W=4, bias=True, rows=None, seed=0):
    """Float64 inputs whose values are exact in float32; `rows` of state, none for 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double().to(DEVICE)

    return {
        "x": draw(B, T, D),
        "weight": draw(D, W),
        "bias": draw(D) if bias else None,
        "state": None if rows == 0 else draw(B if rows is None else rows, D, W - 1),
    }


def run(inputs, backend, dtype, *, cu=None, activation="silu"):
    """Outputs, the state left behind, and the gradients of the sum of their squares."""
    leaves = {name: x if x is None else x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    state = None if leaves["state"] is None else leaves["state"].clone()
    y = causal_conv1d(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        activation=activation,
        state=state,
        cu_seqlens=cu,
        backend=backend,
    )
    found = {"y": y} if state is None else {"y": y, "state": state}
    sum(x.double().square().sum() for x in found.values()).backward()
    return found | {f"d{name}": x.grad for name, x in leaves.items() if x is not None}


def check(inputs, tolerance=1e-6, dtype=torch.float32, **options):
    expected = run(inputs, "torch", torch.float64, **options)
    actual = run(inputs, "triton", dtype, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [0, None], ids=["no state", "state"])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (9, 4), (6, 3), (5, 2), (5, 1)])
def test_matches_torch(T, W, rows, activation):
    check(make(T=T, B=2, W=W, bias=T != 9, rows=rows), activation=activation)


@pytest.mark.parametrize("bounds", [[0, 1, 1, 3, 8, 9], [0, 0, 2, 4, 4, 9, 9]])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_with_empty_and_short_sequences(bounds, with_state):
    dtype = torch.int32 if with_state else torch.int64
    inputs = make(T=bounds[-1], rows=len(bounds) - 1 if with_state else 0)
    check(inputs, cu=torch.tensor(bounds, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_the_whole(W, activation):
    inputs = {name: x.float() for name, x in make(T=7, B=2, W=W).items()}
    x, state = inputs.pop("x"), inputs.pop("state")
    expected_state = state.clone()
    expected = causal_conv1d(x, **inputs, activation=activation, state=expected_state, backend="torch")
    address = state.data_ptr()
    with torch.no_grad():
        parts = [
            causal_conv1d(part, **inputs, activation=activation, state=state, backend="triton")
            for part in x.split([1, 1, 3, 1, 1], dim=1)
        ]
    assert_close(torch.cat(parts, dim=1), expected, 1e-6)
    assert torch.equal(state, expected_state)
    assert state.data_ptr() == address


@pytest.mark.parametrize("T", [1, 9])
def test_views_of_larger_tensors(T):
    """x as a slice of a projection's output, a state and a weight that are not contiguous."""
    inputs = {name: x.float() for name, x in make(T=T, B=2).items()}
    expected = causal_conv1d(**inputs | {"state": inputs["state"].clone()}, backend="torch")
    state = inputs["state"].mT.contiguous().mT
    wide = torch.cat([inputs["x"], torch.full_like(inputs["x"], torch.nan)], dim=2)
    for x in (wide[..., :9], inputs["x"].mT.contiguous().mT):
        with torch.no_grad():
            views = {"x": x, "weight": inputs["weight"].T.contiguous().T, "state": state.clone()}
            assert_close(causal_conv1d(**inputs | views, backend="triton"), expected, 1e-6)


def test_alone_and_in_a_batch_bitwise_the_same():
    inputs = make(T=9, B=2)
    row = {name: x[1:2] if name in ("x", "state") else x for name, x in inputs.items()}
    together, alone = (run(x, "triton", torch.float32) for x in (inputs, row))
    for name in ("y", "state", "dx", "dstate"):
        assert torch.equal(alone[name], together[name][1:2]), name


def test_float16_sums_in_float32():
    inputs = make(T=9, B=2)
    inputs = {name: x.half().double() for name, x in inputs.items()}
    check(inputs, tolerance=1e-3, dtype=torch.float16)


def test_float32_parameters_with_float16_inputs():
    inputs = make(T=9)
    x = inputs["x"].half()
    y = causal_conv1d(x, inputs["weight"].float(), inputs["bias"].float(), activation="silu", backend="triton")
    assert y.dtype == torch.float16
    expected = causal_conv1d(x.double(), inputs["weight"], inputs["bias"], activation="silu")
    torch.testing.assert_close(y.double(), expected, rtol=2**-10, atol=1e-6)  # one rounding, at the end


def test_unsupported_calls_say_so():
    inputs = make(T=3, rows=0)
    with pytest.raises(ValueError, match="tensors are float64"):
        causal_conv1d(**inputs, backend="triton")
    x, wide = torch.zeros(1, 3, 9, device=DEVICE), torch.zeros(9, 17, device=DEVICE)
    with pytest.raises(ValueError, match="W = 17"):
        causal_conv1d(x, wide, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        causal_conv1d(x, wide, backend="cuda")
