"""What every mixer promises: whole == any split == packed, with gradients, over a state that the caller owns."""

import itertools

import pytest
import torch
from compare import assert_close

from lm_zoo import MIXERS, LayerState, Mixer

LENGTH = 21
SPLITS = {"tokens": [1] * LENGTH, "ragged": [5, 1, 1, 12, 2], "long-then-tokens": [19, 1, 1]}
BOUNDS = [0, 0, 4, 5, 5, 18, 21, 21]


def call_in_parts(layer: Mixer, x: torch.Tensor, sizes: list[int], state: LayerState) -> torch.Tensor:
    return torch.cat([layer(part, state=state) for part in x.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_any_split_equals_one_call(layer, inputs, sizes, grad):
    x = inputs(2, LENGTH)
    whole = layer(x)
    with torch.set_grad_enabled(grad):
        assert_close(call_in_parts(layer, x, sizes, layer.init_state(2)), whole, 1e-10)


def test_gradients_flow_across_calls_until_detached(layer, inputs):
    x = inputs(2, LENGTH).requires_grad_()
    state = layer.init_state(2)
    whole = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    parts = call_in_parts(layer, x, SPLITS["ragged"], state)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), [x, *layer.parameters()]), whole, strict=True):
        assert_close(a, b, 1e-10, "gradient")

    start = call_in_parts(layer, x, SPLITS["ragged"], state)
    state.detach_()
    (grad,) = torch.autograd.grad(layer(x[:, :3].detach(), state=state).sum(), x, allow_unused=True)
    assert grad is None
    assert start.requires_grad


def test_a_call_without_gradients_drops_the_old_graph(layer, inputs):
    x = inputs(1, 6).requires_grad_()
    for length in (1, 6):
        state = layer.init_state(1)
        layer(x, state=state)
        with torch.no_grad():
            layer(x[:, :length], state=state)
        later = layer(x.detach(), state=state)
        assert torch.autograd.grad(later.sum(), x, allow_unused=True)[0] is None


def test_packed_documents_equal_each_alone(layer, inputs):
    x = inputs(1, LENGTH).requires_grad_()
    spans = [(a, b) for a, b in itertools.pairwise(BOUNDS) if a < b]
    alone = torch.cat([layer(x[:, a:b]) for a, b in spans], dim=1)
    (expected,) = torch.autograd.grad(alone.square().sum(), x)
    for dtype in (torch.int32, torch.int64):
        packed = layer(x, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype))
        assert_close(packed, alone, 1e-10)
        (grad,) = torch.autograd.grad(packed.square().sum(), x)
        assert_close(grad, expected, 1e-10, "gradient")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_packed_documents_continue_their_own_rows(layer, inputs, grad):
    """Packed calls with ragged and empty documents, then dense calls: every row as if it had been alone."""
    texts = [inputs(1, 14, seed) for seed in range(3)]
    expected = [layer(text) for text in texts]
    state = layer.init_state(3)
    outputs = [[], [], []]
    done = [0, 0, 0]
    with torch.set_grad_enabled(grad):
        for sizes in ([4, 0, 9], [5, 8, 1], [1, 0, 0]):
            x = torch.cat([text[:, d : d + n] for text, d, n in zip(texts, done, sizes, strict=True)], dim=1)
            bounds = torch.tensor([0, *itertools.accumulate(sizes)])
            for row, part in enumerate(layer(x, state=state, cu_seqlens=bounds).split(sizes, dim=1)):
                outputs[row].append(part)
            done = [d + n for d, n in zip(done, sizes, strict=True)]
        for size in (1, 2, 1):  # dense, at positions that differ between the rows
            x = torch.cat([text[:, d : d + size] for text, d in zip(texts, done, strict=True)])
            for row, part in enumerate(layer(x, state=state)):
                outputs[row].append(part[None])
            done = [d + size for d in done]
    for parts, whole in zip(outputs, expected, strict=True):
        y = torch.cat(parts, dim=1)
        assert_close(y, whole[:, : y.shape[1]], 1e-10)


def test_the_future_is_not_seen(layer, inputs):
    x = inputs(1, LENGTH)
    changed = x.clone()
    changed[:, 11:] = 7.0
    torch.testing.assert_close(layer(changed)[:, :11], layer(x)[:, :11], rtol=1e-10, atol=1e-12)


def test_state_selects_reorders_and_resets(layer, inputs):
    x, more = inputs(3, 9), inputs(3, 4, seed=2)
    with torch.no_grad():
        state = layer.init_state(3)
        layer(x, state=state)
        index = torch.tensor([2, 0, 0, 1, 2])
        expected = layer(torch.cat([x[index], inputs(5, 4)], dim=1))[:, 9:]
        assert_close(layer(inputs(5, 4), state=state.select(index)), expected, 1e-10, "selected")

        copy = state.clone()
        addresses = {name: tensor.data_ptr() for name, tensor in copy.tensors.items()}
        copy.reorder_(torch.tensor([1, 1, 0]))
        assert {name: tensor.data_ptr() for name, tensor in copy.tensors.items()} == addresses
        swapped = layer(torch.cat([x[[1, 1, 0]], more], dim=1))[:, 9:]
        assert_close(layer(more, state=copy), swapped, 1e-10, "reordered")

        assert_close(layer(more, state=state), layer(torch.cat([x, more], dim=1))[:, 9:], 1e-10, "the original")
        state.reset()
        assert_close(layer(more, state=state), layer(more), 1e-10, "reset")


@pytest.mark.parametrize("name", ["gla", "retnet", "attention-window"])
def test_state_is_constant_in_length_at_fixed_addresses(make_layer, inputs, name):
    layer = make_layer(name)
    state = layer.init_state(2)
    addresses, size = {n: t.data_ptr() for n, t in state.tensors.items()}, state.nbytes
    with torch.no_grad():
        for length in (100, 1, 1, 30):
            layer(inputs(2, length), state=state)
    assert ({n: t.data_ptr() for n, t in state.tensors.items()}, state.nbytes) == (addresses, size)
    assert size == sum(t.numel() * t.element_size() for t in state.tensors.values())


def test_float32_and_bfloat16_keep_their_dtype(make_layer, inputs):
    for name, dtype in itertools.product(MIXERS, (torch.float32, torch.bfloat16)):
        layer = make_layer(name, dtype)
        state = layer.init_state(2)
        x = inputs(2, 12, dtype=dtype)
        y = layer(x[:, :11], state=state)
        with torch.no_grad():
            last = layer(x[:, 11:], state=state)
        assert y.dtype == last.dtype == dtype
        exact = make_layer(name)
        exact.load_state_dict(layer.state_dict())
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert_close(torch.cat([y, last], dim=1), exact(x.double()), tolerance, f"{name} {dtype}")
        if "S" in state.tensors:
            assert state["S"].dtype == torch.float32


def test_autocast_to_bfloat16(make_layer, inputs):
    for name in MIXERS:
        layer = make_layer(name, torch.float32)
        x = inputs(2, 12, dtype=torch.float32)
        state = layer.init_state(2, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            layer(x[:, :7], state=state)
            with torch.no_grad():
                layer(x[:, 7:8], state=state)
        assert_close(y, layer(x), 3e-2, name)
        y.sum().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in layer.parameters())


# torch.compile itself makes an instance of autograd functions that it meets
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(layer, inputs):
    x = inputs(1, LENGTH)
    for cu_seqlens in (None, torch.tensor(BOUNDS)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens), 1e-10)


def test_mixers_describe_themselves():
    for name, mixer in MIXERS.items():
        assert issubclass(mixer, Mixer)
        assert all(isinstance(getattr(mixer, field), str) for field in ("paper", "equation", "decay", "update")), name
        assert mixer(64).init_state(1, device="meta").batch_size == 1  # defaults build, and no memory is needed to ask


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("gla", {"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ("gla", {"hidden_size": "64"}, TypeError, "hidden_size must be an integer, got '64'"),
        ("gla", {"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ("gla", {"num_heads": 5}, ValueError, "expand_k = 0.5 makes hidden_size = 64 to 32 channels"),
        ("gla", {"expand_v": 0.3}, ValueError, "expand_v = 0.3"),
        ("gla", {"expand_k": -1}, ValueError, "expand_k must be positive"),
        ("gla", {"gate_rank": 0}, ValueError, "gate_rank must be at least 1"),
        ("gla", {"gate_logit_normalizer": 0}, ValueError, "gate_logit_normalizer must be positive"),
        ("retnet", {"num_heads": 64}, ValueError, "even number of key channels, got 1"),
        ("retnet", {"expand_v": "2"}, TypeError, "expand_v must be a number, got '2'"),
        ("retnet", {"rope_base": 0}, ValueError, "rope_base must be positive"),
        ("attention", {"num_heads": 7}, ValueError, "num_heads = 7 does not divide hidden_size = 64"),
        ("attention", {"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 8, got 3"),
        ("attention", {"head_size": 5}, ValueError, "head_size must be even"),
        ("attention", {"window": 0}, ValueError, "window must be at least 1"),
        ("attention", {"windows": 4}, TypeError, "windows"),
    ],
)
def test_impossible_sizes_are_rejected_at_once(name, options, error, message):
    with pytest.raises(error, match=message):
        MIXERS[name](**{"hidden_size": 64, **options})


def test_bad_calls_name_the_argument(layer, inputs):
    x = inputs(2, 3)
    state = layer.init_state(2)
    for arguments, error, message in [
        ({"x": x[0]}, ValueError, r"x must be \[B, T, D\] with D = hidden_size = 32, got \[3, 32\]"),
        ({"x": x[..., :5]}, ValueError, r"got \[2, 3, 5\]"),
        ({"x": x[:, :0]}, ValueError, "T = 0"),
        ({"x": x.tolist()}, TypeError, "x must be a tensor, got list"),
        ({"x": x, "state": layer.init_state(3)}, ValueError, "state must have B = 2 rows, got 3"),
        ({"x": x, "state": {}}, TypeError, "state must be what init_state"),
        ({"x": x, "cu_seqlens": torch.tensor([0, 3])}, ValueError, "B must be 1, got B = 2"),
        ({"x": x[:1], "cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens must end at T = 3, got 2"),
        ({"x": x[:1], "cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens must have one of the dtypes"),
        (
            {"x": x[:1], "state": state, "cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            "state must have N = 1 rows, got 2",
        ),
    ]:
        with pytest.raises(error, match=message):
            layer(**arguments)
    with pytest.raises(ValueError, match=r"index must be \[B\] = \[2\], got \[3\]; use select"):
        state.reorder_(torch.tensor([0, 1, 1]))
