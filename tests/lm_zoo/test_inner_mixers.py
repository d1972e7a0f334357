"""The inner mixers of linearized transformers: their equations with T x T matrices, and every way to call them."""

import itertools
import math

import pytest
import torch
from compare import assert_close

from lm_zoo.layers import LayerState
from lm_zoo.linearized.hybrid import HybridAttention
from lm_zoo.linearized.inner import INNER_MIXERS, Context
from lm_zoo.linearized.liger import LigerAttention
from lm_zoo.modules.feature_maps import FEATURE_MAPS

D, SCALE, ROTARY = 6, 0.7, 4
LENGTH = 23
MIXERS = {
    "sliding": ("hybrid", {"window": 4, "window_kind": "sliding"}),
    "terrace": ("hybrid", {"window": 4, "window_kind": "terrace"}),
    "sliding-shared": ("hybrid", {"window": 5, "window_kind": "sliding", "feature_map_per": "kv_head"}),
    "terrace-shared": ("hybrid", {"window": 3, "feature_map_per": "kv_head", "beta": "complement"}),
    "sliding-1": ("hybrid", {"window": 1, "window_kind": "sliding", "beta": "complement"}),
    "terrace-1": ("hybrid", {"window": 1}),
    "hedgehog": ("hybrid", {"window": 0}),
    "hedgehog-shared": ("hybrid", {"window": 0, "feature_map_per": "kv_head"}),
    "joint": ("hybrid", {"window": 4, "feature_map": "elu"}),
    "liger": ("liger", {"window": 5, "share": 0.3}),
}
HEADS = {"grouped": (4, 2), "plain": (2, 2)}


def make_mixer(name, heads=(4, 2), dtype=torch.float64, **more):
    kind, options = MIXERS[name]
    torch.manual_seed(0)
    mixer = INNER_MIXERS[kind](
        num_heads=heads[0], num_kv_heads=heads[1], head_size=D, scale=SCALE, hidden_size=24, **options | more
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer.to(dtype)


class Texts:
    """q, k and v of B texts, after a rotary embedding of some of their channels that scales too; and that embedding."""

    def __init__(self, batch, length, seed=1, heads=(4, 2), dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda count: torch.randn(batch, length, count, D, dtype=torch.float64, generator=generator)  # noqa: E731
        self.plain_q, self.plain_k, self.v = draw(heads[0]), draw(heads[1]), draw(heads[1]).to(dtype)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
        self.turn = torch.polar(torch.full_like(angle, 1.2), angle)[None]  # [1, T, R / 2]
        self.q, self.k = self.rotate(self.plain_q).to(dtype), self.rotate(self.plain_k).to(dtype)
        self.rotary = self.turn.real.repeat(1, 1, 2).to(dtype), self.turn.imag.repeat(1, 1, 2).to(dtype)

    def rotate(self, x):
        half = ROTARY // 2
        z = torch.complex(x[..., :half], x[..., half:ROTARY]) * self.turn[:, :, None]
        return torch.cat([z.real, z.imag, x[..., ROTARY:]], dim=-1)

    def requires_grad_(self):
        return [x.requires_grad_() for x in (self.q, self.k, self.v)]

    def __getitem__(self, span):
        """q, k, v and the rotary embedding of some tokens."""
        return (*(x[:, span] for x in (self.q, self.k, self.v)), *(x[:, span] for x in self.rotary))


def call(mixer, inputs, state=None, cu_seqlens=None):
    q, k, v, cos, sin = inputs
    return mixer(q, k, v, context=Context(rotary=(cos, sin)), state=state, cu_seqlens=cu_seqlens)


def start(mixer, batch, dtype=torch.float64):
    return mixer.init_state(batch, device=torch.device("cpu"), dtype=dtype)


def in_parts(mixer, texts, sizes, state):
    bounds = [0, *itertools.accumulate(sizes)]
    return torch.cat([call(mixer, texts[slice(a, b)], state) for a, b in itertools.pairwise(bounds)], dim=1)


def expected_hybrid(mixer, texts, softmax_features=True):
    """The equation, one T x T matrix of weights per text and head."""
    q, k, v = texts.q, texts.k, texts.v
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    n, i = torch.arange(length)[:, None], torch.arange(length)
    if mixer.window == 0:
        near = torch.zeros(length, length, dtype=torch.bool)
    elif mixer.window_kind == "sliding":
        near = (i <= n) & (i > n - mixer.window)
    else:
        near = (i <= n) & (i // mixer.window >= n // mixer.window - 1)
    before = (i <= n) & ~near

    def phi(feature_map, x, head):
        if not softmax_features:
            return torch.where(x > 0, x + 1, x.exp())  # elu + 1
        y = x @ feature_map.weight[head].T
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)

    outputs = []
    for h in range(q.shape[2]):
        hk = h // group
        q_h, k_h, v_h = q[:, :, h], k[:, :, hk], v[:, :, hk]
        weights = phi(mixer.q_map, q_h, h) @ phi(mixer.k_map, k_h, h if mixer.state_heads == q.shape[2] else hk).mT
        weights = weights * before if mixer.window else weights.tril()
        if mixer.window:
            s = (SCALE * q_h @ k_h.mT).masked_fill(~near, -math.inf)
            gamma = mixer.window_gate[h].sigmoid()
            beta = 1 if mixer.beta == "one" else 1 - gamma
            weights = gamma * (s - s.amax(dim=-1, keepdim=True)).exp() + beta * weights
        outputs.append(weights @ v_h / weights.sum(dim=-1, keepdim=True))
    return torch.stack(outputs, dim=2)


def expected_liger(mixer, texts):
    q, k, v = texts.q, texts.k, texts.v
    group = q.shape[2] // k.shape[2]
    length = q.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    outputs = []
    for h in range(q.shape[2]):
        hk = h // group
        s = (SCALE * q[:, :, h] @ k[:, :, hk].mT).masked_fill((distance < 0) | (distance >= mixer.window), -math.inf)
        near = s.softmax(dim=-1) @ v[:, :, hk]
        gate = torch.sigmoid(texts.plain_k[:, :, hk]) ** (1 / 16)
        S, far = torch.zeros(len(q), D, D, dtype=torch.float64), []
        for t in range(length):
            write = texts.plain_k[:, t, hk].softmax(dim=-1)[:, :, None] * v[:, t, hk][:, None]
            S = gate[:, t, :, None] * S + write
            far.append((S * texts.plain_q[:, t, h].softmax(dim=-1)[:, :, None]).sum(dim=1))
        outputs.append((1 - mixer.share) * near + mixer.share * torch.stack(far, dim=1))
    return torch.stack(outputs, dim=2)


@pytest.fixture(params=list(MIXERS))
def name(request):
    return request.param


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_the_equation(name, heads, length):
    mixer, texts = make_mixer(name, heads), Texts(2, length, heads=heads)
    if name == "liger":
        return assert_close(call(mixer, texts[:]), expected_liger(mixer, texts), 1e-12)
    leaves = [*texts.requires_grad_(), *mixer.parameters()]
    y, expected = call(mixer, texts[:]), expected_hybrid(mixer, texts, name != "joint")
    assert_close(y, expected, 1e-12)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves, materialize_grads=True, allow_unused=True)
    for a, b in zip(torch.autograd.grad((y * direction).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return None


@pytest.mark.parametrize("window_kind", ["sliding", "terrace"])
@pytest.mark.parametrize("window", [LENGTH, 500])
def test_a_window_longer_than_the_text_is_the_teacher(window, window_kind):
    mixer, texts = make_mixer("sliding", window=window, window_kind=window_kind), Texts(2, LENGTH)
    q, k, v = (x.transpose(1, 2) for x in (texts.q, texts.k, texts.v))
    teacher = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert_close(call(mixer, texts[:]), teacher.transpose(1, 2), 1e-12)
    with torch.no_grad():
        assert_close(in_parts(mixer, texts, [9, 1, 1, 12], start(mixer, 2)), teacher.transpose(1, 2), 1e-12)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_any_split_equals_one_call(name, heads, grad):
    mixer, texts = make_mixer(name, heads), Texts(2, LENGTH, heads=heads)
    whole = call(mixer, texts[:])
    with torch.set_grad_enabled(grad):
        for sizes in ([1] * LENGTH, [8, 1, 1, 2, 4, 1, 6], [3, 9, 11], [22, 1]):
            assert_close(in_parts(mixer, texts, sizes, start(mixer, 2)), whole, 1e-12, f"{sizes}")


def test_gradients_flow_across_calls_until_detached(name):
    mixer, texts = make_mixer(name), Texts(2, LENGTH)
    leaves = [*texts.requires_grad_(), *mixer.parameters()]
    whole = torch.autograd.grad(call(mixer, texts[:]).square().sum(), leaves)
    state = start(mixer, 2)
    parts = in_parts(mixer, texts, [7, 1, 1, 9, 5], state)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), leaves), whole, strict=True):
        assert_close(a, b, 1e-11, "gradient")
    state.detach_()
    more = Texts(2, 9)
    more.requires_grad_()
    later = call(mixer, more[:], state)
    assert all(grad is None for grad in torch.autograd.grad(later.sum(), leaves[:3], allow_unused=True))

    state = start(mixer, 2)
    in_parts(mixer, texts, [9, 4], state)
    with torch.no_grad():
        in_parts(mixer, more, [1] * 9, state)  # whoever writes without gradients drops the graph of what was there
    later = call(mixer, more[:], state)
    assert all(grad is None for grad in torch.autograd.grad(later.sum(), leaves[:3], allow_unused=True))


def test_packed_texts_equal_each_alone(name):
    mixer, texts = make_mixer(name), Texts(1, LENGTH)
    leaves = texts.requires_grad_()
    bounds = [0, 0, 4, 5, 5, 18, 23, 23]
    alone = torch.cat([call(mixer, texts[slice(a, b)]) for a, b in itertools.pairwise(bounds) if a < b], dim=1)
    packed = call(mixer, texts[:], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_close(packed, alone, 1e-12)
    wanted = torch.autograd.grad(alone.square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(packed.square().sum(), leaves), wanted, strict=True):
        assert_close(a, b, 1e-11, "gradient")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_packed_texts_continue_their_own_rows(name, grad):
    """Packed calls with ragged and empty texts, then dense calls at positions that differ between the rows."""
    mixer, texts = make_mixer(name), [Texts(1, 27, seed) for seed in range(3)]
    expected = [call(mixer, text[:]) for text in texts]
    state, outputs, done = start(mixer, 3), [[], [], []], [0, 0, 0]
    with torch.set_grad_enabled(grad):
        for sizes in ([4, 0, 9], [5, 8, 1], [1, 0, 0], [3, 0, 5]):
            parts = [text[slice(d, d + n)] for text, d, n in zip(texts, done, sizes, strict=True)]
            inputs = [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]
            y = call(mixer, inputs, state, torch.tensor([0, *itertools.accumulate(sizes)]))
            for row, part in enumerate(y.split(sizes, dim=1)):
                outputs[row].append(part)
            done = [d + n for d, n in zip(done, sizes, strict=True)]
        for size in (1, 2, 1, 1, 1, 1, 1, 3, 1):
            parts = [text[slice(d, d + size)] for text, d in zip(texts, done, strict=True)]
            y = call(mixer, [torch.cat(tensors) for tensors in zip(*parts, strict=True)], state)
            for row in range(3):
                outputs[row].append(y[row : row + 1])
            done = [d + size for d in done]
    for parts, whole in zip(outputs, expected, strict=True):
        y = torch.cat(parts, dim=1)
        assert_close(y, whole[:, : y.shape[1]], 1e-12)


def test_the_future_is_not_seen(name):
    mixer, texts, changed = make_mixer(name), Texts(1, LENGTH), Texts(1, LENGTH)
    for x in (changed.q, changed.k, changed.v):
        x[:, 11:] = 7.0
    torch.testing.assert_close(call(mixer, changed[:])[:, :11], call(mixer, texts[:])[:, :11], rtol=0, atol=1e-13)


def test_state_selects_reorders_puts_and_resets(name):
    mixer, texts, more = make_mixer(name), Texts(3, 9), Texts(3, 14)

    def rows(inputs, index):
        return [x if len(x) == 1 else x[index] for x in inputs]

    def continued(state, index):
        return torch.cat([call(mixer, rows(more[t : t + 1], index), state) for t in range(9, 14)], dim=1)

    texts.q, texts.k, texts.v = (x[:, :9] for x in (more.q, more.k, more.v))
    expected = call(mixer, more[:])[:, 9:]
    with torch.no_grad():
        state = start(mixer, 3)
        call(mixer, texts[:], state)
        index = torch.tensor([2, 0, 0, 1, 2])
        assert_close(continued(state.select(index), index), expected[index], 1e-12, "selected")

        copy, single = state.clone(), state.select(torch.tensor([1]))
        addresses = {key: tensor.data_ptr() for key, tensor in copy.tensors.items()}
        index = torch.tensor([1, 1, 0])
        copy.reorder_(index)
        assert {key: tensor.data_ptr() for key, tensor in copy.tensors.items()} == addresses
        assert_close(continued(copy, index), expected[index], 1e-12, "reordered")

        copy.reset()
        call(mixer, texts[:], copy)
        copy.put(2, single)
        index = torch.tensor([0, 1, 1])
        assert_close(continued(copy, index), expected[index], 1e-12, "put")

        assert_close(continued(state, torch.arange(3)), expected, 1e-12, "the original")
        state.reset()
        assert_close(call(mixer, texts[:], state), call(mixer, texts[:]), 1e-12, "reset")


def test_a_row_of_another_length_can_be_put_and_moved(name):
    mixer, long, short = make_mixer(name), Texts(1, 14, seed=2), Texts(1, 10, seed=3)
    whole = call(mixer, long[:]), call(mixer, short[:])
    with torch.no_grad():
        state, other = start(mixer, 2), start(mixer, 1)
        call(mixer, [torch.cat([x, x]) for x in long[:9]], state)
        call(mixer, short[:5], other)
        state.put(1, other)
        state.reorder_(torch.tensor([1, 0]))
        pairs = [[torch.cat(x) for x in zip(short[5 + t : 6 + t], long[9 + t : 10 + t], strict=True)] for t in range(5)]
        y = torch.cat([call(mixer, pair, state) for pair in pairs], dim=1)
    assert_close(y[:1], whole[1][:, 5:], 1e-12, "short")
    assert_close(y[1:], whole[0][:, 9:], 1e-12, "long")


def test_state_stays_in_its_place_at_the_key_heads_number(name):
    mixer = make_mixer(name, dtype=torch.float32)
    state = start(mixer, 2, torch.float32)
    assert isinstance(state, LayerState)
    assert all(len(tensor) == 2 for tensor in state.tensors.values())
    assert name.startswith("hedgehog") or state["keys"].shape[1] == 2
    addresses, size = {key: tensor.data_ptr() for key, tensor in state.tensors.items()}, state.nbytes
    with torch.no_grad():
        in_parts(mixer, Texts(2, 70, dtype=torch.float32), [30, 1, 1, 38], state)
    assert ({key: tensor.data_ptr() for key, tensor in state.tensors.items()}, state.nbytes) == (addresses, size)
    assert mixer.init_state(1, device=torch.device("meta"), dtype=torch.float32).batch_size == 1


def test_float32_and_bfloat16(name):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        mixer, texts = make_mixer(name, dtype=dtype), Texts(2, 40, dtype=dtype)
        exact, wide = make_mixer(name), Texts(2, 40)
        exact.load_state_dict(mixer.state_dict())
        wide.q, wide.k, wide.v = texts.q.double(), texts.k.double(), texts.v.double()
        wide.rotary = tuple(x.double() for x in texts.rotary)
        expected = call(exact, wide[:])
        state = start(mixer, 2, dtype)
        assert state["S"].dtype == torch.float32
        whole = call(mixer, texts[:])
        with torch.no_grad():
            parts = in_parts(mixer, texts, [17, *[1] * 23], state)
        for what, y in (("whole", whole), ("parts", parts)):
            assert y.dtype == dtype
            assert_close(y, expected, tolerance, f"{what} in {dtype}")


def test_autocast(name):
    mixer, texts = make_mixer(name, dtype=torch.float32), Texts(2, 12, dtype=torch.float32)
    state = start(mixer, 2, torch.bfloat16)
    expected = call(mixer, texts[:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(call(mixer, texts[:]), expected, 1e-2)
        with torch.no_grad():
            assert_close(in_parts(mixer, texts, [7, 1, 1, 3], state), expected, 2e-2)


def test_ten_thousand_tokens(name):
    mixer, texts = make_mixer(name, dtype=torch.float32), Texts(1, 10_003, dtype=torch.float32)
    texts.q, texts.k = texts.q * 20, texts.k * 20  # scores in the thousands
    with torch.no_grad():
        whole = call(mixer, texts[:])
        y = in_parts(mixer, texts, [10_000, 1, 1, 1], start(mixer, 1, torch.float32))
    assert torch.isfinite(whole).all()
    assert_close(y[:, -3:], whole[:, -3:], 1e-5)
    assert whole.abs().max() <= texts.v.abs().max() * (1 if name != "liger" else 20)


def test_gamma_starts_at_a_tenth_and_features_at_the_identity():
    mixer = INNER_MIXERS["hybrid"](num_heads=4, num_kv_heads=2, head_size=D, scale=1.0, hidden_size=24)
    torch.testing.assert_close(mixer.window_gate.sigmoid(), torch.full((4,), 0.1))
    assert torch.equal(mixer.k_map.weight, torch.eye(D).expand(4, D, D))
    assert sum(p.numel() for p in INNER_MIXERS["liger"](**geometry()).parameters()) == 0
    assert "window_gate" not in dict(make_mixer("hedgehog").named_parameters())


def test_window_dropout_trains_the_features_alone():
    mixer, texts = make_mixer("terrace", window_dropout=1.0), Texts(2, LENGTH)
    alone = make_mixer("hedgehog")
    alone.load_state_dict({key: value for key, value in mixer.state_dict().items() if key != "window_gate"})
    assert_close(call(mixer.train(), texts[:]), call(alone, texts[:]), 1e-12, "dropped")
    kept = call(make_mixer("terrace"), texts[:])
    assert_close(call(mixer.eval(), texts[:]), kept, 1e-12, "not in training")
    with torch.no_grad():
        assert_close(in_parts(mixer.train(), texts, [9, 14], start(mixer, 2)), kept, 1e-12, "never with a state")
    mixer = make_mixer("terrace", window_dropout=0.5).train()
    torch.manual_seed(1)
    outputs = {round(call(mixer, texts[:]).sum().item(), 6) for _ in range(20)}
    assert outputs == {round(y.sum().item(), 6) for y in (kept, call(alone, texts[:]))}


def geometry(**changes):
    return {"num_heads": 4, "num_kv_heads": 2, "head_size": D, "scale": 1.0, "hidden_size": 24} | changes


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        ("hybrid", {"window": -1}, ValueError, "window must be at least 0, got -1"),
        ("hybrid", {"window": 4.0}, TypeError, "window must be an integer, got 4.0"),
        ("hybrid", {"window": True}, TypeError, "window must be an integer"),
        ("hybrid", {"window_kind": "square"}, ValueError, "window_kind must be one of 'sliding', 'terrace'"),
        ("hybrid", {"feature_map": "identity"}, ValueError, "feature_map must be one of .*'hedgehog'.*got 'identity'"),
        ("hybrid", {"feature_map_per": "head"}, ValueError, "feature_map_per must be one of"),
        ("hybrid", {"beta": 1}, ValueError, "beta must be one of 'one', 'complement', got 1"),
        ("hybrid", {"window_dropout": 1.5}, ValueError, r"window_dropout must be in \[0, 1\], got 1.5"),
        ("hybrid", {"window_dropout": True}, TypeError, "window_dropout must be a number"),
        ("hybrid", {"windows": 3}, TypeError, "windows"),
        ("liger", {"window": 0}, ValueError, "window must be at least 1, got 0"),
        ("liger", {"share": -0.1}, ValueError, r"share must be in \[0, 1\], got -0.1"),
        ("liger", {"share": "half"}, TypeError, "share must be a number"),
    ],
)
def test_impossible_options_are_rejected_at_once(mixer, options, error, message):
    with pytest.raises(error, match=message):
        INNER_MIXERS[mixer](**geometry(), **options)


def test_bad_calls_name_the_argument(name):
    mixer, texts = make_mixer(name), Texts(2, 5)
    with pytest.raises(ValueError, match="state must have B = 2 rows, got 3"):
        call(mixer, texts[:], start(mixer, 3))
    with pytest.raises(ValueError, match="state must have N = 2 rows, got 3"):
        call(mixer, Texts(1, 5)[:], start(mixer, 3), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="cu_seqlens must end at T = 5, got 4"):
        call(mixer, Texts(1, 5)[:], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="B must be 1, got B = 2"):
        call(mixer, texts[:], cu_seqlens=torch.tensor([0, 5]))


def test_the_registry_and_the_maps():
    assert INNER_MIXERS["hybrid"] is HybridAttention
    assert INNER_MIXERS["liger"] is LigerAttention
    for feature_map in (name for name, kind in FEATURE_MAPS.items() if kind.positive):
        mixer = make_mixer("terrace", feature_map=feature_map)
        texts = Texts(1, 9)
        assert torch.isfinite(call(mixer, texts[:])).all()


def test_positions_need_not_be_turned():
    """GPT-2 has learned positions: q and k come as they are."""
    mixer, texts = make_mixer("liger"), Texts(2, LENGTH)
    texts.q, texts.k = texts.plain_q, texts.plain_k
    y = mixer(texts.q, texts.k, texts.v, context=Context(), state=None, cu_seqlens=None)
    assert_close(y, expected_liger(mixer, texts), 1e-12)
