"""DeltaNet, Gated DeltaNet, DeltaProduct, KDA and Mamba-2 against their papers and transformers' own layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from transformers import KimiLinearConfig, Mamba2Config, Mamba2ForCausalLM, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    recurrent_kimi_delta_attention,
)
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers import MIXERS, DeltaNet, DeltaProduct, GatedDeltaNet, KimiDeltaAttention, Mamba2
from lm_zoo.modules.decay import SoftplusDecay, stretched
from lm_zoo.modules.short_conv import ShortConvolution

B, T, D, H = 2, 70, 24, 2  # T: more than one chunk


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build(mixer, *arguments, **options):
    """A layer in float64 whose norms, decays and write strengths differ between heads and channels."""
    torch.manual_seed(0)
    layer = mixer(*arguments, **options).double()
    for name, parameter in layer.named_parameters():
        if "norm" in name or name == "D":
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        if "beta_proj" in name or "decay_proj" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.7)
    return layer


# ---- The papers' equations, one head, token and state matrix at a time, in float64.


def convolve(u, weight, bias=None):
    """y_t = silu(sum_w weight[:, w] u_{t - W + 1 + w} + bias)"""
    size = weight.shape[1]
    rows = []
    for t in range(u.shape[1]):
        window = [weight[:, w] * u[:, t - size + 1 + w] for w in range(size) if t - size + 1 + w >= 0]
        rows.append(sum(window) + (0 if bias is None else bias))
    y = torch.stack(rows, dim=1)
    return y * torch.sigmoid(y)


def project(layer, x, heads, value_heads):
    """q, k and v `[B, T, heads, size]`, after the convolution; q and k of unit length."""
    u = torch.cat([x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
    u = convolve(u, layer.conv.weight)
    keys = layer.q_proj.out_features
    q, k, v = u.split([keys, layer.k_proj.out_features, layer.v_proj.out_features], dim=-1)
    q, k = (z.reshape(B, T, -1, keys // heads) for z in (q, k))
    q, k = (z / (z.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    return q, k, v.reshape(B, T, value_heads, -1)


def delta_rule(q, k, v, a, b):
    """S <- (I - b k k^T) Diag(a) S + b k v^T, o = S^T q / sqrt(K); a `[B, T, HV, K]`."""
    groups = v.shape[2] // q.shape[2]
    o = torch.zeros_like(v)
    identity = torch.eye(q.shape[-1], dtype=v.dtype)
    for n in range(v.shape[0]):
        for h in range(v.shape[2]):
            S = torch.zeros(q.shape[-1], v.shape[-1], dtype=v.dtype)
            for t in range(v.shape[1]):
                key = k[n, t, h // groups]
                S = (identity - b[n, t, h] * torch.outer(key, key)) @ torch.diag(a[n, t, h]) @ S
                S = S + b[n, t, h] * torch.outer(key, v[n, t, h])
                o[n, t, h] = S.T @ q[n, t, h // groups] / math.sqrt(q.shape[-1])
    return o


def rms_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("use_gate", [False, True])
def test_deltanet_is_its_equation(x, factor, use_gate):
    options = {"expand_k": 0.5, "expand_v": 1.5, "conv_size": 3, "use_gate": use_gate}
    layer = build(DeltaNet, D, H, allow_negative_eigenvalues=factor == 2, **options)
    q, k, v = project(layer, x, H, H)
    assert (q.shape[-1], v.shape[-1]) == (6, 18)
    b = factor * torch.sigmoid(x @ layer.beta_proj.weight.T)
    assert b.max() > 0.9 * factor
    o = rms_norm(delta_rule(q, k, v, torch.ones_like(q), b), layer.norm.weight)
    if use_gate:
        o = o * F.silu(x @ layer.gate_proj.weight.T).view_as(o)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("value_heads", [2, 6])
def test_gated_deltanet_is_its_equation(x, factor, value_heads):
    layer = build(GatedDeltaNet, D, H, num_value_heads=value_heads, allow_negative_eigenvalues=factor == 2)
    q, k, v = project(layer, x, H, value_heads)
    assert (q.shape[-1], v.shape[-1]) == (9, 36 // value_heads)
    b = factor * torch.sigmoid(x @ layer.beta_proj.weight.T)
    dt = F.softplus(x @ layer.decay_proj.weight.T + layer.log_decay.dt_bias)
    a = torch.exp(-layer.log_decay.A_log.exp() * dt)[..., None].expand(-1, -1, -1, q.shape[-1])
    o = rms_norm(delta_rule(q, k, v, a, b), layer.norm.weight)
    o = o * F.silu(x @ layer.gate_proj.weight.T).view_as(o)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


# ---- transformers' own layers, which compute their recurrences in float32, with the weights copied in.


def assert_same_layer(layer, other, x, pairs, tolerance=1e-5):
    """Outputs, gradients of the input, and of the weights: `pairs` of ours and theirs, and how theirs are laid out."""
    with torch.no_grad():
        for ours, theirs, arrange in pairs:
            arrange(theirs).copy_(ours)
    x = x.requires_grad_()
    dy = torch.randn(*x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    y, expected = layer(x), other(x)
    assert_close(y, expected, tolerance)
    weights = [ours for ours, _, _ in pairs]
    assert len(weights) == len(list(layer.parameters()))
    found = torch.autograd.grad(y, [x, *weights], dy)
    wanted = torch.autograd.grad(expected, [x, *{id(t): t for _, t, _ in pairs}.values()], dy)
    assert_close(found[0], wanted[0], tolerance, "gradient of x")
    by_weight = dict(zip(dict.fromkeys(id(t) for _, t, _ in pairs), wanted[1:], strict=True))
    for grad, (_, theirs, arrange) in zip(found[1:], pairs, strict=True):
        assert_close(grad, arrange(by_weight[id(theirs)]), 10 * tolerance, "gradient of a weight")


def same(weight):
    return weight


def conv1d(weight):
    return weight.squeeze(1)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_gated_deltanet_is_that_of_olmo_hybrid(x, negative, value_heads):
    layer = build(GatedDeltaNet, D, H, num_value_heads=value_heads, allow_negative_eigenvalues=negative)
    config = OlmoHybridConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=H,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=9,
        linear_value_head_dim=36 // value_heads,
        linear_allow_neg_eigval=negative,
    )
    other = OlmoHybridGatedDeltaNet(config, 0).double()
    pairs = [(getattr(layer, name).weight, getattr(other, name).weight, same) for name in ("q_proj", "k_proj")]
    pairs += [
        (layer.v_proj.weight, other.v_proj.weight, same),
        (layer.o_proj.weight, other.o_proj.weight, same),
        (layer.decay_proj.weight, other.a_proj.weight, same),
        (layer.beta_proj.weight, other.b_proj.weight, same),
        (layer.gate_proj.weight, other.g_proj.weight, same),
        (layer.conv.weight, other.conv1d.weight, conv1d),
        (layer.log_decay.A_log, other.A_log, same),
        (layer.log_decay.dt_bias, other.dt_bias, same),
        (layer.norm.weight, other.o_norm.weight, same),
    ]
    assert_same_layer(layer, other, x, pairs)


def test_gated_deltanet_is_that_of_qwen3_next(x):
    """Whose heads are grouped the same way, with q, k, v and the gate of each group side by side in one matrix."""
    layer = build(GatedDeltaNet, D, H, num_value_heads=4, norm_eps=1e-6)
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=H,
        linear_num_value_heads=4,
        linear_key_head_dim=9,
        linear_value_head_dim=9,
        linear_conv_kernel_dim=4,
    )
    other = Qwen3NextGatedDeltaNet(config, 0).double()

    def part(first, last):  # of the rows of each group
        return lambda weight: weight.unflatten(0, (H, -1))[:, first:last]

    def grouped(weight):
        return weight.unflatten(0, (H, -1))

    with torch.no_grad():
        qkvz, ba = grouped(other.in_proj_qkvz.weight), grouped(other.in_proj_ba.weight)
        for proj, first, last in (("q", 0, 9), ("k", 9, 18), ("v", 18, 36), ("gate", 36, 54)):
            qkvz[:, first:last] = grouped(getattr(layer, f"{proj}_proj").weight)
        for proj, first, last in (("beta", 0, 2), ("decay", 2, 4)):
            ba[:, first:last] = grouped(getattr(layer, f"{proj}_proj").weight)
        other.conv1d.weight[:, 0] = layer.conv.weight
        for ours, theirs in (
            (layer.log_decay.A_log, other.A_log),
            (layer.log_decay.dt_bias, other.dt_bias),
            (layer.norm.weight, other.norm.weight),
            (layer.o_proj.weight, other.out_proj.weight),
        ):
            theirs.copy_(ours)
    x = x.requires_grad_()
    y, expected = layer(x), other(x)
    assert_close(y, expected, 1e-5)
    (found,), (wanted,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, expected))
    assert_close(found, wanted, 1e-5, "gradient")


def test_deltanet_is_gated_deltanet_that_never_forgets(x):
    layer = build(DeltaNet, D, H, expand_k=0.75, expand_v=1.5, use_gate=True, allow_negative_eigenvalues=True)
    gated = build(GatedDeltaNet, D, H, allow_negative_eigenvalues=True)
    gated.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.constant_(gated.log_decay.A_log, -math.inf)
    assert_close(layer(x), gated(x), 1e-12)


# ---- Mamba-2


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_mamba2_is_its_equation(x, groups, negative):
    layer = build(Mamba2, D, head_size=8, state_size=5, num_groups=groups, allow_negative_eigenvalues=negative)
    torch.nn.init.normal_(layer.in_proj.weight)
    heads, inner = 6, 48
    z, u, dt = (x @ layer.in_proj.weight.T).split([inner, inner + 2 * groups * 5, heads], dim=-1)
    value, k, q = convolve(u, layer.conv.weight, layer.conv.bias).split([inner, groups * 5, groups * 5], dim=-1)
    value = value.reshape(B, T, heads, 8)
    k, q = (w.reshape(B, T, groups, 5).repeat_interleave(heads // groups, dim=2) for w in (k, q))
    dt = torch.log(1 + torch.exp(dt + layer.log_decay.dt_bias))
    a = torch.exp(-layer.log_decay.A_log.exp() * dt)
    if negative:
        a = 2 * a - 1
        assert 0.2 < (a < 0).double().mean() < 0.8
    o = torch.zeros_like(value)
    for n in range(B):
        for h in range(heads):
            S = torch.zeros(5, 8, dtype=torch.float64)
            for t in range(T):
                S = a[n, t, h] * S + torch.outer(k[n, t, h], dt[n, t, h] * value[n, t, h])
                o[n, t, h] = S.T @ q[n, t, h] + layer.D[h] * value[n, t, h]
    o = (o.flatten(2) * F.silu(z)).reshape(B, T, groups, -1)
    o = rms_norm(o, layer.norm.weight.view(groups, -1)).flatten(2)
    expected = o @ layer.out_proj.weight.T
    assert_close(layer(x), expected, 1e-12)

    # the signs go over from call to call and from pack to pack
    state = layer.init_state(B)
    for grad in (True, False):
        state.reset()
        with torch.set_grad_enabled(grad):
            parts = [layer(part, state=state) for part in x.split([1, 1, 20, 1, 47], dim=1)]
        assert_close(torch.cat(parts, dim=1), expected, 1e-12)
        state.reset()
        first = layer(torch.cat([x[0, :33], x[1, :2]])[None], state=state, cu_seqlens=torch.tensor([0, 33, 35]))
        second = layer(torch.cat([x[0, 33:], x[1, 2:]])[None], state=state, cu_seqlens=torch.tensor([0, 37, 105]))
        row = torch.cat([first[0, :33], second[0, :37]])
        assert_close(torch.stack([row, torch.cat([first[0, 33:], second[0, 37:]])]), expected, 1e-12)


def mamba2_pairs(layer, other):
    """All weights, one to one."""
    return [
        (layer.in_proj.weight, other.in_proj.weight, same),
        (layer.conv.weight, other.conv1d.weight, conv1d),
        (layer.conv.bias, other.conv1d.bias, same),
        (layer.log_decay.A_log, other.A_log, same),
        (layer.log_decay.dt_bias, other.dt_bias, same),
        (layer.D, other.D, same),
        (layer.norm.weight, other.norm.weight, same),
        (layer.out_proj.weight, other.out_proj.weight, same),
    ]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.2)])
def test_mamba2_is_that_of_transformers(x, groups, limit):
    layer = build(Mamba2, D, head_size=8, state_size=5, num_groups=groups, dt_limit=limit)
    config = Mamba2Config(
        hidden_size=D, num_heads=6, head_dim=8, state_size=5, n_groups=groups, chunk_size=16, time_step_limit=limit
    )
    other = Mamba2Mixer(config, 0).double()
    assert_same_layer(layer, other, x, mamba2_pairs(layer, other))


def test_a_mamba2_model_is_that_of_transformers(tokens):
    """With the MLP of every block at zero, a zoo model is the stack of the paper: norm, mixer, residual."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=61,
        hidden_size=D,
        num_heads=6,
        head_dim=8,
        state_size=16,
        n_groups=2,
        num_hidden_layers=3,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
        initializer_range=0.3,
        pad_token_id=0,
    )
    other = Mamba2ForCausalLM(config).eval()
    options = {"head_size": 8, "state_size": 16, "num_groups": 2}
    model = ZooForCausalLM(
        ZooConfig(vocab_size=61, hidden_size=D, num_hidden_layers=3, norm_eps=1e-5, mixers={"mamba2": options})
    ).eval()
    pairs = [
        (other.backbone.embeddings, model.model.embed_tokens),
        (other.backbone.norm_f, model.model.norm),
        (other.lm_head, model.lm_head),
    ]
    pairs += [(a.norm, b.mixer_norm) for a, b in zip(other.backbone.layers, model.model.layers, strict=True)]
    with torch.no_grad():
        for theirs, ours in pairs:
            ours.weight.copy_(theirs.weight)
        for theirs, ours in zip(other.backbone.layers, model.model.layers, strict=True):
            ours.mlp.down_proj.weight.zero_()
            for here, there, arrange in mamba2_pairs(ours.mixer, theirs.mixer):
                here.copy_(arrange(there))
        ids = tokens(2, T)
        expected = other(ids).logits
        assert expected.std() > 0.3
        assert_close(model(ids).logits, expected, 1e-5)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(written, other.generate(ids, max_new_tokens=8, do_sample=False))


# ---- Kimi delta attention


@pytest.mark.parametrize("factor", [1, 2])
def test_kimi_delta_attention_is_its_equation(x, factor):
    layer = build(KimiDeltaAttention, D, H, head_size=5, allow_negative_eigenvalues=factor == 2)
    q, k, v = project(layer, x, H, H)
    b = factor * torch.sigmoid(x @ layer.beta_proj.weight.T)
    (down, up), (gate_down, gate_up) = layer.decay_proj, layer.gate_proj
    dt = F.softplus((x @ down.weight.T @ up.weight.T).view(B, T, H, 5) + layer.log_decay.dt_bias)
    a = torch.exp(-layer.log_decay.A_log.exp()[:, None] * dt)
    assert a.std(-1).max() > 0.3
    o = rms_norm(delta_rule(q, k, v, a, b), layer.norm.weight)
    o = o * torch.sigmoid(x @ gate_down.weight.T @ gate_up.weight.T).view_as(o)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


def test_kimi_delta_attention_is_that_of_transformers(x):
    layer = build(KimiDeltaAttention, D, H, head_size=8)
    config = KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_heads=H,
        linear_head_dim=8,
    )
    other = KimiLinearDeltaAttention(config, 0).double()
    gate = other.forget_gate
    pairs = [(getattr(layer, name).weight, getattr(other, name).weight, same) for name in ("q_proj", "k_proj")]
    pairs += [
        (layer.v_proj.weight, other.v_proj.weight, same),
        (layer.o_proj.weight, other.o_proj.weight, same),
        (layer.beta_proj.weight, other.b_proj.weight, same),
        (layer.decay_proj[0].weight, gate.f_a_proj.weight, same),
        (layer.decay_proj[1].weight, gate.f_b_proj.weight, same),
        (layer.log_decay.A_log, gate.A_log, torch.flatten),
        (layer.log_decay.dt_bias, gate.dt_bias, lambda bias: bias.view(H, 8)),
        (layer.gate_proj[0].weight, other.g_a_proj.weight, same),
        (layer.gate_proj[1].weight, other.g_b_proj.weight, same),
        (layer.conv.weight, other.conv1d.weight, conv1d),
        (layer.norm.weight, other.o_norm.weight, same),
    ]
    assert_same_layer(layer, other, x, pairs, 5e-5)  # theirs adds up log decays in float32


# ---- DeltaProduct


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_deltaproduct_is_its_equation(x, steps, gated):
    options = {"num_householders": steps, "gated": gated, "expand_k": 0.5, "conv_size": 3}
    layer = build(DeltaProduct, D, H, **options)
    u = torch.cat([x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
    q, k, v = convolve(u, layer.conv.weight).split([12, 12 * steps, 24 * steps], dim=-1)
    q, k, v = q.reshape(B, T, H, 6), k.reshape(B, T, steps, H, 6), v.reshape(B, T, steps, H, 12)
    q, k = (z / (z.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    b = 2 * torch.sigmoid(x @ layer.beta_proj.weight.T).view(B, T, steps, H)
    a = torch.ones(B, T, H, dtype=x.dtype)
    if gated:
        dt = F.softplus(x @ layer.decay_proj.weight.T + layer.log_decay.dt_bias)
        a = torch.exp(-layer.log_decay.A_log.exp() * dt)
    o = torch.zeros(B, T, H, 12, dtype=x.dtype)
    for n in range(B):
        for h in range(H):
            S = torch.zeros(6, 12, dtype=x.dtype)
            for t in range(T):
                S = a[n, t, h] * S
                for j in range(steps):
                    key, strength = k[n, t, j, h], b[n, t, j, h]
                    S = S - strength * torch.outer(key, key @ S) + strength * torch.outer(key, v[n, t, j, h])
                o[n, t, h] = S.T @ q[n, t, h] / math.sqrt(6)
    o = rms_norm(o, layer.norm.weight)
    if gated:
        o = o * F.silu(x @ layer.gate_proj.weight.T).view_as(o)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


def test_deltaproduct_of_one_step_is_deltanet(x):
    options = {"allow_negative_eigenvalues": True}
    pairs = [(DeltaProduct, {"gated": False}, DeltaNet, {}), (DeltaProduct, {"gated": True}, GatedDeltaNet, {})]
    for mixer, mixer_options, other, other_options in pairs:
        sizes = {"expand_k": 0.75, "expand_v": 1.5} | options
        layer = build(mixer, D, H, num_householders=1, **sizes, **mixer_options)
        same_layer = build(other, D, H, **sizes, **other_options)
        same_layer.load_state_dict(layer.state_dict())
        assert_close(layer(x), same_layer(x), 1e-12)


# ---- What the eigenvalues are for: states that follow a group, exactly, by weights set by hand.


def by_hand(layer):
    """All weights zero, but for an output that is the normalised o, and a convolution that only sees its own token."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.norm.weight.fill_(1)
        layer.conv.weight[:, -1] = 1
    return layer


def follow(layer, ids):
    """The outputs for one-hot tokens, in one call and token by token; far from zero, SiLU is the identity."""
    x = F.one_hot(ids, layer.hidden_size)[None].to(layer.norm.weight.dtype)
    state = layer.init_state(1)
    with torch.no_grad():
        whole, steps = layer(x), torch.cat([layer(token, state=state) for token in x.split(1, dim=1)], dim=1)
    assert_close(steps, whole, 1e-5)
    return whole[0]


LARGE = 100.0
START, ONE, ZERO = 0, 1, 2  # tokens: the first of a text, and bits


def bits(count):
    ids = torch.randint(1, 3, (count,), generator=torch.Generator().manual_seed(5))
    ids[0] = START
    return ids, torch.where((ids == ONE).cumsum(0) % 2 == 0, 1.0, -1.0)


def test_reflections_count_the_parity_of_bits():
    """One head with k = q = e_0: a one turns the sign of the state, (1 - 2) S, which b <= 1 cannot do."""
    ids, parity = bits(500)
    outputs = []
    for negative in (True, False):
        layer = by_hand(DeltaNet(4, 1, allow_negative_eigenvalues=negative))
        with torch.no_grad():
            layer.q_proj.weight[0, :3] = layer.k_proj.weight[0, :3] = LARGE
            layer.v_proj.weight[0, START] = 1
            layer.beta_proj.weight[0, :3] = torch.tensor([0, LARGE, -LARGE])
            layer.o_proj.weight[0, 0] = 1
        outputs.append(follow(layer, ids)[:, 0])
    torch.testing.assert_close(outputs[0] / outputs[0][0], parity)
    assert (outputs[1][ids.cumsum(0) > ONE][5:].abs() < 1e-3).all()


def test_negative_decays_count_the_parity_of_bits():
    """Mamba-2 with B = C: dt = 0 keeps the state, dt -> inf turns its sign, a = 2 exp(-dt) - 1 = -1."""
    ids, parity = bits(500)
    outputs = []
    for negative in (True, False):
        layer = by_hand(Mamba2(4, head_size=8, state_size=2, allow_negative_eigenvalues=negative))
        with torch.no_grad():
            z, value, k, q, dt = layer.in_proj.weight.split([8, 8, 2, 2, 1])
            z[:, :3] = k[:, :3] = q[:, :3] = 1
            value[:, START] = 1
            dt[0, :3] = torch.tensor([0, LARGE, -LARGE])
            layer.out_proj.weight[0, 0] = 1
        outputs.append(follow(layer, ids)[:, 0])
    torch.testing.assert_close(outputs[0] / outputs[0][0], parity)
    assert (outputs[1][(ids == ONE).cumsum(0) > 0].abs() < 1e-30).all()


def test_two_reflections_turn_a_triangle():
    """A one is two reflections at 60 degrees, so a turn by 120: its powers follow the cycle of three elements.

    One generalised Householder matrix has real eigenvalues only, a turn has not. The plane is that of channels 0 and 1;
    channel 2 keeps a value to compare with, since the norm takes away the length of o.
    """
    ids, _ = bits(300)
    layer = by_hand(DeltaProduct(4, 1, num_householders=2))
    half, height = math.cos(math.pi / 3), math.sin(math.pi / 3)
    with torch.no_grad():
        first, second = layer.k_proj.weight.split(4)
        first[0, :3] = LARGE
        second[2, START] = LARGE
        second[:2, ONE] = LARGE * torch.tensor([half, height])
        layer.v_proj.weight[0, START] = layer.v_proj.weight[5, START] = LARGE
        layer.q_proj.weight[:3, :3] = LARGE * torch.tensor([height, half, 1])[:, None]
        layer.beta_proj.weight[:, :3] = torch.tensor([0, LARGE, -LARGE])
        layer.o_proj.weight.copy_(torch.eye(4))
    y = follow(layer, ids)
    cosine = y[:, 0] / y[:, 1]  # with q, which is at 30 degrees
    angle = (ids == ONE).cumsum(0) * (2 * math.pi / 3)
    torch.testing.assert_close(cosine, torch.cos(angle - math.pi / 6), rtol=0, atol=1e-4)
    assert {round(value, 1) for value in cosine.tolist()} == {0.9, 0.0, -0.9}  # all three


def test_stretched_decay():
    """log |2 e^g - 1| and its sign, at both ends and where it is next to nothing."""
    g = torch.tensor([-0.0, -1e-6, -0.1, -0.69, -0.7, -5.0, -80.0, -1e4, -math.inf], dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        log_size, negative = stretched(g.to(dtype))
        decay = torch.where(negative, -1, 1) * log_size.exp()
        torch.testing.assert_close(decay.double(), 2 * g.to(dtype).double().exp() - 1, rtol=tolerance, atol=0)
        nothing = torch.full((7,), -math.log(2), dtype=dtype)
        around = (nothing + torch.arange(-3, 4) * torch.finfo(dtype).eps).requires_grad_()
        log_size, _ = stretched(around)
        log_size.sum().backward()
        assert log_size.isfinite().all()
        assert (log_size < -14).all()
        assert around.grad.isfinite().all()
    assert stretched(torch.tensor([-1e-6]))[0].item() == pytest.approx(-2e-6, rel=1e-5)


# ---- The layers over the recurrences of transformers, in place of the zoo's op.


def gated_delta_rule(q, k, v, log_decay=None, beta=None, **_):
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    return torch_recurrent_gated_delta_rule(q, k, v, log_decay, beta)[0]


def kimi_delta_rule(q, k, v, log_decay, beta, **_):
    return recurrent_kimi_delta_attention(q, k, v, log_decay, beta, None, False)[0]


@pytest.mark.parametrize(
    ("mixer", "options", "oracle"),
    [
        (DeltaNet, {"allow_negative_eigenvalues": True}, gated_delta_rule),
        (GatedDeltaNet, {"num_value_heads": 4, "allow_negative_eigenvalues": True}, gated_delta_rule),
        (DeltaProduct, {"num_householders": 3}, gated_delta_rule),
        (DeltaProduct, {"num_householders": 2, "gated": True}, gated_delta_rule),
        (KimiDeltaAttention, {"allow_negative_eigenvalues": True}, kimi_delta_rule),
    ],
)
def test_the_op_is_the_recurrence_of_transformers(x, monkeypatch, mixer, options, oracle):
    layer = build(mixer, D, H, **options)
    x = x.requires_grad_()
    dy = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    inputs = {"x": x, **dict(layer.named_parameters())}
    y = layer(x)
    gradients = torch.autograd.grad(y, inputs.values(), dy)
    monkeypatch.setattr(f"{mixer.__module__}.recur", oracle)
    expected = layer(x)
    assert_close(y, expected, 1e-5)
    wanted = torch.autograd.grad(expected, inputs.values(), dy)
    for name, a, b in zip(inputs, gradients, wanted, strict=True):
        assert_close(a, b, 1e-5, f"gradient of {name}")


# ---- Initial values, dtypes, and what cannot be.


WIDE = {  # 96 heads of few channels, so that initial values have statistics
    "deltanet": {"num_heads": 96},
    "gated_deltanet": {"num_heads": 96, "expand_k": 1.0, "expand_v": 1.0},
    "deltaproduct": {"num_heads": 96, "gated": True},
    "kda": {"num_heads": 96},
    "mamba2": {"head_size": 2, "state_size": 4},
}


def test_initial_values_also_of_a_model_built_without_memory():
    config = ZooConfig(vocab_size=50, hidden_size=96, num_hidden_layers=5, mixers=WIDE)
    with torch.device("meta"):
        late = ZooForCausalLM(config)
    late.to_empty(device="cpu")
    late.init_weights()
    for module in (*ZooForCausalLM(config).modules(), *late.modules()):
        if isinstance(module, SoftplusDecay):
            rate, dt = module.A_log.exp(), F.softplus(module.dt_bias)
            low, high = module.rates
            assert low <= rate.min() < low + 2 < high - 2 < rate.max() <= high
            assert 0.00099 < dt.min() < 0.002 < 0.05 < dt.max() < 0.101
        elif isinstance(module, ShortConvolution):
            for parameter in (module.weight, *([] if module.bias is None else [module.bias])):
                assert 0.45 < parameter.abs().max() <= 0.5
                assert abs(parameter.std() - 0.5 / math.sqrt(3)) < 0.05
        elif isinstance(module, Mamba2):
            assert (module.D == 1).all()


@pytest.mark.parametrize(("name", "options"), WIDE.items(), ids=WIDE)
def test_decays_are_computed_in_float32_and_spared_by_weight_decay(name, options):
    from lm_zoo.train.optim import parameter_groups  # brings Lightning along

    layer = MIXERS[name](96, **options).bfloat16()
    decayed = {id(parameter) for parameter in parameter_groups(layer, 0.1)[0]["params"]}
    assert id(layer.conv.weight) in decayed
    gates = [module for module in layer.modules() if isinstance(module, SoftplusDecay)]
    assert len(gates) == (name != "deltanet")
    for gate in gates:
        assert not decayed & {id(gate.A_log), id(gate.dt_bias)}
        assert gate(torch.zeros(1, 2, *gate.dt_bias.shape, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("deltanet", {"num_heads": 3}, ValueError, "expand_k = 1.0 makes hidden_size = 64 to 64 channels"),
        ("deltanet", {"conv_size": 0}, ValueError, "conv_size must be at least 1, got 0"),
        ("deltanet", {"use_gate": 1}, TypeError, "use_gate must be True or False, got 1"),
        ("deltanet", {"allow_negative_eigenvalues": "yes"}, TypeError, "allow_negative_eigenvalues must be True or"),
        ("deltanet", {"norm_eps": -1.0}, ValueError, "norm_eps must be positive"),
        ("deltanet", {"conv_bias": True}, TypeError, "conv_bias"),
        ("gated_deltanet", {"num_heads": 4, "num_value_heads": 6}, ValueError, "multiple of num_heads = 4, got 6"),
        ("gated_deltanet", {"num_value_heads": 0}, ValueError, "num_value_heads must be at least 1"),
        ("gated_deltanet", {"expand_v": 0.7}, ValueError, "expand_v = 0.7 makes hidden_size = 64"),
        ("gated_deltanet", {"allow_negative_eigenvalues": 2}, TypeError, "allow_negative_eigenvalues must be True or"),
        ("deltaproduct", {"num_householders": 0}, ValueError, "num_householders must be at least 1, got 0"),
        ("deltaproduct", {"num_householders": 1.5}, TypeError, "num_householders must be an integer, got 1.5"),
        ("deltaproduct", {"gated": None}, TypeError, "gated must be True or False, got None"),
        ("kda", {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 64"),
        ("kda", {"head_size": 0}, ValueError, "head_size must be at least 1, got 0"),
        ("kda", {"allow_negative_eigenvalues": 0}, TypeError, "allow_negative_eigenvalues must be True or False"),
        ("mamba2", {"head_size": 48}, ValueError, "head_size = 48 does not divide the 128 channels"),
        ("mamba2", {"expand": 0}, ValueError, "expand must be positive"),
        ("mamba2", {"num_groups": 3}, ValueError, "num_groups must divide the 2 heads, got 3"),
        ("mamba2", {"state_size": -1}, ValueError, "state_size must be at least 1"),
        ("mamba2", {"dt_limit": 0.1}, TypeError, "dt_limit must be two numbers, the least and the greatest, got 0.1"),
        ("mamba2", {"dt_limit": [0.2, 0.1]}, ValueError, r"dt_limit must be 0 <= least < greatest, got \[0.2, 0.1\]"),
        ("mamba2", {"dt_limit": ("0", "1")}, TypeError, "dt_limit must be two numbers"),
    ],
)
def test_impossible_options_are_rejected_at_once(name, options, error, message):
    with pytest.raises(error, match=message):
        MIXERS[name](**{"hidden_size": 64, **options})
