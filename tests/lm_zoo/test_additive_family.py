"""The additive matrix-state layers against their papers' equations in float64, and after 100,000 tokens."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.kernels import linear_attention_step
from lm_zoo.layers.hgrn2 import HGRN2
from lm_zoo.layers.lightnet import LightNet
from lm_zoo.layers.lightning import LightningAttention
from lm_zoo.layers.linear_attention import LinearAttention
from lm_zoo.modules.log_sum_exp import running_log_sum_exp

B, T, D, H = 2, 11, 24, 2
LONG = 100_000


def draw(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    return draw(B, T, D)


def heads(x, count=H):
    return x.unflatten(-1, (count, -1))


def rms_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def randomize(layer, seed=0):
    """Every parameter random, so that none hides behind an initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer


def exponential_features(y):  # softmax over [y, -y], written as exponentials over their sum
    both = torch.cat([y.exp(), (-y).exp()], dim=-1)
    return both / both.sum(-1, keepdim=True)


KERNELS = {
    "elu": lambda y: torch.where(y > 0, y + 1, y.exp()),
    "relu": lambda y: y * (y > 0),
    "squared_relu": lambda y: y * y * (y > 0),
    "identity": lambda y: y,
}


def weights(layer, name, q, k):
    """phi(q_t) . phi(k_s) for all pairs, `[B, H, T, T]`."""
    if name == "taylor":
        s = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
        return 1 + s + s * s / 2
    if name in ("hedgehog", "t2r"):
        q, k = (
            torch.stack([y[:, :, h] @ m.weight[h].T for h in range(H)], dim=2)
            for y, m in ((q, layer.q_map), (k, layer.k_map))
        )
        if name == "t2r":
            q, k = (y + m.bias for y, m in ((q, layer.q_map), (k, layer.k_map)))
    phi = {"hedgehog": exponential_features, "t2r": KERNELS["relu"]}.get(name) or KERNELS[name]
    return torch.einsum("bthk,bshk->bhts", phi(q), phi(k))


@pytest.mark.parametrize("denominator", [True, False], ids=["denominator", "norm"])
@pytest.mark.parametrize("name", ["elu", "relu", "squared_relu", "identity", "taylor", "hedgehog", "t2r"])
def test_linear_attention_as_weighted_averages(x, name, denominator):
    denominator = denominator and name != "identity"
    layer = randomize(LinearAttention(D, H, feature_map=name, denominator=denominator)).double()
    assert layer.key_size == (16 if name == "taylor" else 12)
    q, k, v = (heads(F.linear(x, proj.weight)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    w = weights(layer, name, q, k).tril()
    o = torch.einsum("bhts,bshv->bthv", w, v)
    if denominator:
        o = o / (w.sum(-1).transpose(1, 2)[..., None] + 1e-6)
    else:
        o = rms_norm(o / math.sqrt(layer.q_map.size), layer.norm.weight)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


def test_taylor_features_are_half_of_the_paper_s():
    layer = LinearAttention(64, feature_map="taylor")
    assert layer.q_map.size == 1 + 16 + 16 * 17 // 2
    assert layer.init_state(1)["S"].shape == (1, 4, 153, 17)


def test_no_active_feature_gives_zero_and_finite_gradients(x):
    layer = LinearAttention(D, H, feature_map="relu").double()
    torch.nn.init.zeros_(layer.q_proj.weight)
    y = layer(x)
    assert not y.any()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["elu", "taylor", "hedgehog"])
def test_linear_attention_after_100_000_tokens(name):
    """Decoded in float32 token by token, against sums in float64."""
    layer = randomize(LinearAttention(8, 1, feature_map=name, head_size=4))
    x = draw(1, LONG + 3, 8, dtype=torch.float32) + 0.5  # an offset: sums that cancel would hide what is lost
    state = layer.init_state(1)
    with torch.no_grad():
        q, k, v = (p(x).unflatten(-1, (1, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k, v = layer.q_map(q), layer.k_map(k), torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        linear_attention_step(*(y[:, :LONG] for y in (q, k, v)), None, None, state["S"], scale=1.0)
        decoded = torch.cat([layer(x[:, t : t + 1], state=state) for t in range(LONG, LONG + 3)], dim=1)
        S = torch.einsum("btk,btv->tkv", k[:, :, 0].double(), v[:, :, 0].double()).cumsum(0)[LONG:]
        o = torch.einsum("tkv,tk->tv", S, q[0, LONG:, 0].double())
    expected = (o[:, :-1] / o[:, -1:]) @ layer.o_proj.weight.double().T
    assert_close(decoded[0], expected, 1e-4, "decoded")

    state = layer.init_state(1)
    with torch.no_grad():
        for part in x[:, :LONG].split(20_000, dim=1):
            layer(part, state=state)
        prefilled = torch.cat([layer(x[:, t : t + 1], state=state) for t in range(LONG, LONG + 3)], dim=1)
    assert_close(prefilled[0], expected, 1e-4, "prefilled")


def lightning_slopes(layer, count, index):
    """As TransNormerLLM's code has them: those of ALiBi for a power of two heads, less with the depth."""
    depth = 1 - index / (count - 1) if count > 1 else 1
    return [2 ** (-8 * (h + 1) / H) * depth for h in range(H)]


@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_lightning_attention_in_its_parallel_form(x, index, count):
    layer = randomize(LightningAttention(D, H, layer_index=index, num_layers=count)).double()
    q, k, v = (heads(F.linear(x, proj.weight)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = F.silu(q), F.silu(k)
    time = torch.arange(T, dtype=torch.float64)
    distance = time[:, None] - time
    assert (layer.lrpe is not None) == (index == 0)
    outputs = []
    for h, slope in enumerate(lightning_slopes(layer, count, index)):
        turn = torch.ones(T, T, D // H, dtype=torch.float64)
        if index == 0:
            turn = (distance[..., None] * layer.lrpe.theta[h]).cos()
        w = torch.einsum("btk,bsk,tsk->bts", q[:, :, h], k[:, :, h], turn) * (-slope * distance).exp()
        outputs.append(w.tril() @ v[:, :, h])
    y = rms_norm(torch.cat(outputs, dim=-1), layer.norm.weight) * (x @ layer.gate_proj.weight.T)
    # the authors' 1e-5 beside the depth is left out above
    assert_close(layer(x), y @ layer.o_proj.weight.T, 1e-5)


def test_lightning_angles_start_as_in_the_paper():
    theta = LightningAttention(64, 4).lrpe.theta.detach().flatten()
    assert_close(theta, torch.tensor([10000 ** (-2 * j / 64) for j in range(64)]), 1e-6)
    assert not list(LightningAttention(64, 4, layer_index=1, num_layers=2).buffers())


@pytest.mark.parametrize(("index", "count"), [(0, 3), (1, 3), (2, 3)])
def test_lightning_attention_equals_minimax(index, count):
    """transformers' MiniMax-01 layer with the same weights: whole, with gradients, and from its own state."""
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, head_dim=D // H, num_hidden_layers=count,
        block_size=4, layer_types=["linear_attention"] * count, hidden_act="silu",
    )  # fmt: skip
    theirs = randomize(MiniMaxLightningAttention(config, index)).double()
    theirs.slope_rate = theirs.get_slope_rate().double()
    theirs.query_decay, theirs.key_decay, theirs.diagonal_decay = theirs.decay_factors(theirs.slope_rate)
    layer = LightningAttention(
        D, H, lrpe=False, gate="sigmoid", silu_values=True, layer_index=index, num_layers=count, norm_eps=1e-6
    ).double()
    qkv = theirs.qkv_proj.weight.detach().view(H, 3, D // H, D)
    with torch.no_grad():
        for i, projection in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            projection.weight.copy_(qkv[:, i].reshape(D, D))
        layer.gate_proj.weight.copy_(theirs.output_gate.weight)
        layer.norm.weight.copy_(theirs.norm.weight)
        layer.o_proj.weight.copy_(theirs.out_proj.weight)
    x = draw(B, T, D).requires_grad_()
    expected, final = theirs(x, None, None)
    state = layer.init_state(B)
    y = layer(x, state=state)
    assert_close(y, expected, 1e-6)  # theirs are products of float32 slopes
    assert_close(state["S"], final, 1e-6)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert_close(grad, expected_grad, 1e-5)


def test_a_model_tells_its_layers_their_depth():
    config = ZooConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=4, mixers={"lightning": {"num_heads": 2}, "gla": {}},
        pattern=["gla", "lightning"],
    )  # fmt: skip
    layers = [block.mixer for block in ZooForCausalLM(config).model.layers]
    assert [(layer.layer_index, layer.num_layers) for layer in layers[1::2]] == [(1, 4), (3, 4)]


def gammas(logits):
    """The paper's lower bounds of all layers: cumulative softmax over the depth, less its first row."""
    P = torch.stack([row.exp() for row in logits])
    c = (P / P.sum(0)).cumsum(0)
    return c - c[0]


@pytest.mark.parametrize("index", [None, 0, 1, 2])
def test_hgrn2(x, index):
    layer = randomize(HGRN2(D, H, layer_index=index or 0, num_layers=3)).double()
    gamma = torch.zeros(D, dtype=torch.float64)
    if index is not None:
        bounds = randomize(layer.shared_over_depth(3)).double()
        layer.share(bounds)
        gamma = gammas(bounds.logits)[index]
    f = gamma + (1 - gamma) / (1 + (-(x @ layer.f_proj.weight.T)).exp())
    q, i = F.silu(x @ layer.q_proj.weight.T), x @ layer.i_proj.weight.T
    f, q, i = heads(f), heads(q), heads(i)
    S = torch.zeros(B, H, D // H, D // H, dtype=torch.float64)
    outputs = []
    for t in range(T):
        S = f[:, t, :, :, None] * S + (1 - f[:, t])[..., None] * i[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]).flatten(1))
    y = rms_norm(torch.stack(outputs, dim=1), layer.norm.weight)
    assert_close(layer(x), y @ layer.o_proj.weight.T, 1e-12)


def test_a_layer_alone_is_deep_copied_and_has_no_bounds():
    layer = copy.deepcopy(HGRN2(D, H))
    assert layer.shared is None
    assert not any("logits" in name for name in layer.state_dict())


def test_lightnet_as_averages_over_time(x):
    layer = randomize(LightNet(D, H, gate_rank=3)).double()
    q, k, v = (F.linear(x, proj.weight) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    outputs = []
    for t in range(T):
        S = torch.einsum("bshk,bshv->bhkv", heads(k[:, : t + 1].softmax(dim=1)), heads(v[:, : t + 1]))
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, heads(F.silu(q))[:, t]).flatten(1))
    low, high = layer.gate_proj
    y = rms_norm(torch.stack(outputs, dim=1), layer.norm.weight) * F.silu(x @ low.weight.T @ high.weight.T)
    assert_close(layer(x), y @ layer.o_proj.weight.T, 1e-12)


@pytest.mark.parametrize("bounds", [None, [0, 0, 4, 5, 5, 29, 33, 33]], ids=["dense", "packed"])
def test_running_log_sum_exp(bounds):
    """Values and gradients of the plain sums, from -inf and from an earlier z."""
    x = (draw(1 if bounds else 2, 33, 5) * 2 + 900).requires_grad_()  # exp(x) would overflow
    spans = list(itertools.pairwise(bounds)) if bounds else [(0, 33)]
    rows = len(spans) if bounds else 2
    start = draw(rows, 5, seed=8) * 2 + 900
    start[0] = -math.inf
    start[-1, 0] = -math.inf
    start.requires_grad_()
    parts, finals = [], []
    for n, (a, b) in enumerate(spans):
        z = start[n : n + 1] if bounds else start
        for t in range(a, b):
            high = torch.maximum(z, x[:, t])
            z = high + ((z - high).exp() + (x[:, t] - high).exp()).log()
            parts.append(z)
        finals.append(z)
    expected, last = torch.stack(parts, dim=1), torch.cat(finals)
    before, z, end = running_log_sum_exp(x, start, None if bounds is None else torch.tensor(bounds))
    assert_close(z, expected, 1e-14)
    torch.testing.assert_close(end, last, rtol=1e-14, atol=0)
    firsts = [a for a, b in spans if a < b]
    others = [t for t in range(33) if t not in firsts]
    assert_close(before[:, others], z[:, [t - 1 for t in others]], 0.0)
    taken = start[[n for n, (a, b) in enumerate(spans) if a < b]] if bounds else start[:, None]
    assert torch.equal(before[:, firsts], taken[None] if bounds else taken)
    weight = draw(*z.shape, seed=9)
    grads = torch.autograd.grad((z * weight).sum(), [x, start])
    finite = start.isfinite()  # the plain sums have no gradient at -inf
    for grad, plain in zip(grads, torch.autograd.grad((expected * weight).sum(), [x, start]), strict=True):
        where = finite if grad.shape == start.shape else torch.ones_like(grad, dtype=torch.bool)
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(grad[where], plain[where], rtol=1e-10, atol=1e-12)


def test_lightnet_after_100_000_tokens():
    """Token by token in float32 against averages in float64; and the same from prefills."""
    layer = randomize(LightNet(8, 1, gate_rank=4))
    x = draw(1, LONG + 3, 8, dtype=torch.float32) + 0.5
    with torch.no_grad():
        q, k, v, gate = F.silu(layer.q_proj(x)), layer.k_proj(x), layer.v_proj(x), layer.gate_proj(x)
        S = torch.stack([k[0, : t + 1].double().softmax(0).T @ v[0, : t + 1].double() for t in range(LONG, LONG + 3)])
        o = torch.einsum("tkv,tk->tv", S, q[0, LONG:].double())
        y = rms_norm(o, layer.norm.weight.double()) * F.silu(gate[0, LONG:].double())
        expected = y @ layer.o_proj.weight.double().T

        state = layer.init_state(1)
        z = [state["z"][0].clone()]
        for logit in k[0, :LONG].double():
            z.append(torch.logaddexp(z[-1], logit))
        z = torch.stack(z)[None, :, None]
        log_decay = (z[:, :-1] - z[:, 1:]).float()
        weight = (k[:, :LONG, None] - z[:, 1:]).exp().float()
        linear_attention_step(q[:, :LONG, None], weight, v[:, :LONG, None], log_decay, None, state["S"], scale=1.0)
        state.write("z", z[:, -1, 0])
        decoded = torch.cat([layer(x[:, t : t + 1], state=state) for t in range(LONG, LONG + 3)], dim=1)
        assert_close(decoded[0], expected, 1e-4, "decoded")

        state = layer.init_state(1)
        for part in x[:, :LONG].split(20_000, dim=1):
            layer(part, state=state)
        prefilled = torch.cat([layer(x[:, t : t + 1], state=state) for t in range(LONG, LONG + 3)], dim=1)
        assert_close(prefilled[0], expected, 1e-4, "prefilled")


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        (HGRN2, {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 24"),
        (HGRN2, {"layer_index": 3, "num_layers": 3}, ValueError, "layer_index must be in"),
        (LightNet, {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 24"),
        (LightNet, {"gate_rank": 0}, ValueError, "gate_rank must be at least 1"),
        (LightningAttention, {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 24"),
        (LightningAttention, {"lrpe": "no"}, TypeError, "lrpe must be True or False"),
        (LightningAttention, {"gate": "relu"}, ValueError, "gate must be one of 'linear', 'sigmoid', got 'relu'"),
        (LightningAttention, {"layer_index": 1}, ValueError, r"layer_index must be in \[0, num_layers = 1\), got 1"),
        (LightningAttention, {"layer_index": 1.0}, TypeError, "layer_index must be an integer"),
        (LightningAttention, {"num_layers": 0}, ValueError, "num_layers must be at least 1"),
        (LinearAttention, {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 24"),
        (LinearAttention, {"feature_map": "exp"}, ValueError, "feature_map must be one of 'elu', .*, got 'exp'"),
        (LinearAttention, {"feature_map": "identity"}, ValueError, "denominator must be false with feature_map"),
        (LinearAttention, {"denominator": 1}, TypeError, "denominator must be True or False, got 1"),
        (LinearAttention, {"head_size": 0}, ValueError, "head_size must be at least 1"),
        (LinearAttention, {"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
    ],
)
def test_impossible_options_are_rejected_at_once(mixer, options, error, message):
    with pytest.raises(error, match=message):
        mixer(D, **options)
