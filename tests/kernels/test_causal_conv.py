"""causal_conv1d against its equation, in every mode: whole, split, token by token, packed."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo.kernels import causal_conv1d

WIDTHS = [1, 2, 4]


def make(batch: int, length: int, channels: int = 6, width: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(batch, length, channels), draw(channels, width), draw(channels), draw(batch, channels, width - 1)


def equation(x, weight, bias, activation, state=None):
    """y_t = sum_w weight[:, w] x_{t - W + 1 + w} + bias, written out."""
    reach = weight.shape[1] - 1
    past = torch.zeros_like(x[:, :1]).expand(-1, reach, -1) if state is None else state.mT
    padded = torch.cat([past, x], dim=1)
    rows = [
        sum(weight[:, w] * padded[:, t + w] for w in range(reach + 1)) + (0 if bias is None else bias)
        for t in range(x.shape[1])
    ]
    y = torch.stack(rows, dim=1)
    return F.silu(y) if activation == "silu" else y


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_equation(width, length, activation):
    x, weight, bias, state = make(2, length, width=width)
    assert_close(causal_conv1d(x, weight, activation=activation), equation(x, weight, None, activation), 1e-12)
    expected = equation(x, weight, bias, activation, state)
    assert_close(causal_conv1d(x, weight, bias, activation=activation, state=state.clone()), expected, 1e-12)


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 1, 5, 1], [4, 5]])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("grad", [True, False])
def test_any_split_equals_one_call(width, sizes, grad):
    x, weight, bias, first = make(2, 9, width=width)
    state = first.clone()
    address = state.data_ptr()
    with torch.set_grad_enabled(grad):
        parts = [causal_conv1d(part, weight, bias, activation="silu", state=state) for part in x.split(sizes, dim=1)]
    assert_close(torch.cat(parts, dim=1), equation(x, weight, bias, "silu", first), 1e-12)
    assert state.data_ptr() == address
    torch.testing.assert_close(state, x[:, 9 - (width - 1) :].mT, rtol=0, atol=0)


def test_gradients_flow_across_calls():
    x, weight, bias, _ = make(2, 9)
    x.requires_grad_()
    weight.requires_grad_()
    state = torch.zeros(2, 6, 3, dtype=torch.float64)
    parts = [causal_conv1d(part, weight, bias, state=state) for part in x.split([2, 1, 6], dim=1)]
    split = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), (x, weight))
    whole = torch.autograd.grad(causal_conv1d(x, weight, bias).square().sum(), (x, weight))
    for a, b in zip(split, whole, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bounds", [[0, 9], [0, 1, 3, 9], [0, 0, 4, 4, 5, 9, 9]])
def test_packed_equals_each_sequence_alone(width, bounds):
    x, weight, bias, _ = make(1, 9, width=width)
    count = len(bounds) - 1
    first = make(count, 1, width=width, seed=1)[3]
    expected, states = [], []
    for n in range(count):
        state = first[n : n + 1].clone()
        if bounds[n] < bounds[n + 1]:
            part = x[:, bounds[n] : bounds[n + 1]]
            expected.append(causal_conv1d(part, weight, bias, activation="silu", state=state))
        states.append(state)
    for dtype in (torch.int32, torch.int64):
        state = first.clone()
        cu = torch.tensor(bounds, dtype=dtype)
        y = causal_conv1d(x, weight, bias, activation="silu", state=state, cu_seqlens=cu)
        assert_close(y, torch.cat(expected, dim=1), 1e-12)
        torch.testing.assert_close(state, torch.cat(states), rtol=0, atol=0)


def test_packed_without_state_starts_from_zero():
    x, weight, bias, _ = make(1, 9)
    y = causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, 2, 2, 9]))
    parts = [equation(x[:, :2], weight, bias, None), equation(x[:, 2:], weight, bias, None)]
    assert_close(y, torch.cat(parts, dim=1), 1e-12)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bounds", [None, [0, 5], [0, 1, 1, 5]])
def test_gradcheck(activation, bounds):
    x, weight, bias, _ = make(1, 5, channels=3, width=3)
    state = make(1 if bounds is None else len(bounds) - 1, 1, channels=3, width=3, seed=2)[3]
    cu = None if bounds is None else torch.tensor(bounds)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, state)]

    def call(x, weight, bias, state):
        state = state.clone()
        y = causal_conv1d(x, weight, bias, activation=activation, state=state, cu_seqlens=cu)
        return y, state

    assert torch.autograd.gradcheck(call, inputs)


def test_bfloat16_sums_in_float32():
    x, weight, bias, _ = make(2, 50)
    x = x.bfloat16()
    y = causal_conv1d(x, weight.float(), bias.float(), activation="silu")
    assert y.dtype == torch.bfloat16
    expected = equation(x.double(), weight, bias, "silu")
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-7, atol=1e-6)  # at most one rounding, at the end


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
def test_compiles_whole():
    x, weight, bias, _ = make(1, 9)
    cu = torch.tensor([0, 4, 9])
    for given in (None, cu):

        def call(x, weight, bias, cu=given):
            return causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu)

        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert_close(compiled(x, weight, bias), call(x, weight, bias), 1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[B, T, D\]"),
        ({"x": torch.zeros(2, 0, 6)}, ValueError, "T = 0"),
        ({"x": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, "x must have one of the dtypes"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \[D, W\] = \[6, any\], got \[5, 4\]"),
        ({"weight": torch.zeros(6, 0)}, ValueError, "W >= 1"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[D\] = \[6\], got \[5\]"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"activation": "relu"}, ValueError, "activation must be one of None, 'silu', got 'relu'"),
        ({"state": torch.zeros(2, 6, 4)}, ValueError, r"state must be \[B, D, W - 1\] = \[2, 6, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "B must be 1, got B = 2"),
        ({"x": torch.zeros(1, 5, 6), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "end at T = 5, got 4"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    arguments = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), **changes}
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)
