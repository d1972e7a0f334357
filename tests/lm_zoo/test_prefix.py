"""Prefix linear attention is what its weights say, token by token against token, however a text is handed over."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.causal_lm import IGNORE, next_labels
from lm_zoo.layers import LightNet, LinearAttention

D, H, T, M = 16, 2, 12, 5
LAYERS = {
    "elu": (LinearAttention, {}),
    "taylor": (LinearAttention, {"feature_map": "taylor", "head_size": 4}),
    "sum": (LinearAttention, {"feature_map": "identity", "denominator": False}),
    "lightnet": (LightNet, {}),
}
HYBRID = {
    "mixers": {
        "linear_attention": {"num_heads": H},
        "lightnet": {"num_heads": H},
        "local": {"type": "attention", "num_heads": H, "window": 4},
    },
    "pattern": ["linear_attention", "local", "lightnet"],
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    mixer, options = LAYERS[request.param]
    torch.manual_seed(0)
    return mixer(D, num_heads=H, **options).double()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ZooConfig(vocab_size=31, hidden_size=D, num_hidden_layers=3, initializer_range=0.3, **HYBRID)
    model = ZooForCausalLM(config).double().eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [0]
    return model


def texts(batch: int, length: int = T, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(1, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def oracle(layer, x: Tensor, prefix: list[int]) -> Tensor:
    """O(T^2): who sees whom, and the weights of what is seen."""
    row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    lengths = torch.tensor(prefix)[:, None, None]
    seen = ((column <= row) | ((row < lengths) & (column < lengths)))[:, None]  # [B, 1, t, s]
    q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if isinstance(layer, LightNet):
        logits = k[:, :, None].expand(-1, -1, x.shape[1], -1, -1).masked_fill(~seen[..., None], -torch.inf)
        weights = torch.einsum("bhtk,bhtsk->bhts", F.silu(q), logits.softmax(dim=-2))
        o = (weights @ v).transpose(1, 2).flatten(2)
        return layer.o_proj(layer.norm(o, layer.gate_proj(x)))
    q, k = (f(y.transpose(1, 2)).transpose(1, 2) for f, y in ((layer.q_map, q), (layer.k_map, k)))
    weights = (q @ k.mT).masked_fill(~seen, 0)
    if layer.norm is None:
        o = (weights @ v) / (weights.sum(dim=-1, keepdim=True) + 1e-6)
    else:
        o = layer.norm(weights @ v * q.shape[-1] ** -0.5)
    return layer.o_proj(o.transpose(1, 2).flatten(2))


def test_the_layer_is_its_oracle_with_gradients(layer):
    x = texts(3).requires_grad_()
    lengths = [M, 0, T]
    inputs = [x, *layer.parameters()]
    y, expected = layer(x, prefix_length=torch.tensor(lengths)), oracle(layer, x, lengths)
    assert_close(y, expected, 1e-10)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), wanted, strict=True):
        assert_close(a, b, 1e-9, "gradient")
    assert_close(layer(x, prefix_length=M), oracle(layer, x, [M] * 3), 1e-10)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_state_goes_on_from_the_prefix(layer, grad):
    x = texts(2)
    expected = oracle(layer, x, [M, M + 1])
    lengths = torch.tensor([M, M + 1])
    with torch.set_grad_enabled(grad):
        for cut in (M + 1, M + 2, T):
            state = layer.init_state(2)
            parts = [layer(x[:, :cut], state=state, prefix_length=lengths)]
            parts += [layer(x[:, t : t + 1], state=state) for t in range(cut, T)]
            assert_close(torch.cat(parts, dim=1), expected, 1e-10)


def test_a_prefix_reads_what_came_before_it(layer):
    """A second prefix in a text: its tokens see the first call, and all of each other."""
    x = texts(1)
    state = layer.init_state(1)
    layer(x[:, :M], state=state, prefix_length=M)
    second = layer(x[:, M:], state=state, prefix_length=T - M)
    assert_close(second, oracle(layer, x, [T])[:, M:], 1e-10)
    assert_close(
        layer(texts(1, 1, 2), state=state), oracle(layer, torch.cat([x, texts(1, 1, 2)], 1), [T])[:, T:], 1e-10
    )


def test_tokens_after_a_prefix_can_be_taken_back(layer):
    x = texts(2)
    state = layer.init_state(2)
    with torch.no_grad():
        state.begin()
        layer(x, state=state, prefix_length=M)
        state.keep([M + 1, M + 3], T)
        after = layer(x[:, :2], state=state)
    for row, count in enumerate((M + 1, M + 3)):
        text = torch.cat([x[row, :count], x[row, :2]])[None]
        assert_close(after[row : row + 1], oracle(layer, text, [M])[:, count:], 1e-10)


def test_packed_documents_have_prefixes_of_their_own(layer):
    x = texts(1, 14)
    bounds, lengths = [0, 0, 4, 5, 11, 14], [0, 2, 1, 6, 0]
    alone = [
        layer(x[:, a:b], prefix_length=m)
        for (a, b), m in zip(itertools.pairwise(bounds), lengths, strict=True)
        if b > a
    ]
    for dtype in (torch.int32, torch.int64):
        options = {"cu_seqlens": torch.tensor(bounds, dtype=dtype), "prefix_length": torch.tensor(lengths, dtype=dtype)}
        assert_close(layer(x, **options), torch.cat(alone, dim=1), 1e-10)
        state = layer.init_state(5)
        assert_close(layer(x, state=state, **options), torch.cat(alone, dim=1), 1e-10)
        continued = layer(texts(5, 1, 3), state=state)[3]
        expected = layer(torch.cat([x[:, 5:11], texts(5, 1, 3)[3:4]], dim=1), prefix_length=6)[0, -1:]
        assert_close(continued, expected, 1e-10)


def test_padding_does_not_count(model):
    ids = tokens(2)
    lengths = torch.tensor([M, M - 2])
    alone = [model(ids[:1], prefix_length=M).logits, model(ids[1:, 4:], prefix_length=M - 2).logits]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = model(ids, attention_mask=mask, prefix_length=lengths).logits
    assert_close(padded[:1], alone[0], 1e-10)
    assert_close(padded[1:, 4:], alone[1], 1e-10)


def test_a_model_prefills_and_decodes_with_it(model):
    ids = tokens(2)
    whole = model(ids, prefix_length=M).logits
    assert not torch.allclose(whole, model(ids).logits)
    with torch.no_grad():
        cache = model.init_cache(2)
        logits = [model(ids[:, :7], past_key_values=cache, prefix_length=M).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(7, T)]
    assert_close(torch.cat(logits, dim=1), whole, 1e-10)


def test_generate_reads_the_prompt_with_it(model):
    """With beams, with padding, and without a cache the same text as token by token."""
    prompt = tokens(1, 8)
    ids = prompt
    for _ in range(4):
        logits = model(ids, prefix_length=M).logits[:, -1]
        logits[:, 0] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "prefix_length": M}
    assert torch.equal(model.generate(prompt, **options), ids)
    padded = F.pad(prompt, (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=(padded > 0).long(), **options)[:, 3:], ids)
    beams = model.generate(prompt, num_beams=2, **options | {"prefix_length": torch.tensor([M])})
    assert torch.equal(beams[:, :8], prompt)


def test_the_prefix_is_not_scored(model):
    """Its tokens have seen each other: only what comes after it counts in the loss."""
    ids = tokens(2)
    expected = F.cross_entropy(model(ids, prefix_length=M).logits[:, M - 1 : -1].flatten(0, 1), ids[:, M:].flatten())
    assert_close(model(ids, labels=ids, prefix_length=M).loss, expected, 1e-10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    targets = next_labels(ids, ids.shape, mask, None, torch.tensor([2, 4]))
    assert (targets != IGNORE).int().argmax(dim=1).tolist() == [1, 3 + 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix_length": T + 1}, ValueError, r"prefix_length must be from 0 to the tokens of each text"),
        ({"prefix_length": -1}, ValueError, "prefix_length must be from 0"),
        ({"prefix_length": 2.0}, TypeError, "prefix_length must be a whole number"),
        ({"prefix_length": True}, TypeError, "prefix_length must be a whole number"),
        ({"prefix_length": torch.ones(2)}, TypeError, r"prefix_length .* got torch.float32"),
        ({"prefix_length": torch.ones(3, dtype=torch.int64)}, ValueError, r"one number for each of 2 texts, got \[3\]"),
        (
            {"prefix_length": 3, "cu_seqlens": torch.tensor([0, 2, T])},
            ValueError,
            r"prefix_length must be from 0 .* \[2, 10\], got \[3, 3\]",
        ),
    ],
)
def test_impossible_prefixes_are_refused(options, error, message):
    layer = LinearAttention(D, num_heads=H)
    with pytest.raises(error, match=message):
        layer(texts(1 if "cu_seqlens" in options else 2).float(), **options)


def test_a_model_without_such_a_layer_refuses():
    config = ZooConfig(vocab_size=31, hidden_size=D, num_hidden_layers=2, mixers={"gla": {"num_heads": H}})
    with pytest.raises(ValueError, match=r"prefix_length needs .* \(linear_attention, lightnet\), this model has gla"):
        ZooForCausalLM(config)(tokens(1), prefix_length=2)


def test_ranks_that_share_a_text_refuse(monkeypatch):
    monkeypatch.setattr("lm_zoo.layers.prefix.active_group", lambda: "ranks")
    with pytest.raises(ValueError, match="prefix_length is not for texts that ranks share"):
        LinearAttention(D, num_heads=H)(texts(1).float(), prefix_length=2)
