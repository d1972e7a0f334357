"""DeltaNet, Gated DeltaNet, DeltaProduct and KDA against their papers and transformers' own layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from layer_oracles import assert_same_layer, build, conv1d, convolve, rms_norm, same
from transformers import KimiLinearConfig, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    recurrent_kimi_delta_attention,
)
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from lm_zoo.layers import DeltaNet, DeltaProduct, GatedDeltaNet, KimiDeltaAttention

B, T, D, H = 2, 70, 24, 2  # T: more than one chunk


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ---- The papers' equations, one head, token and state matrix at a time, in float64.


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
@pytest.mark.parametrize(("value_heads", "use_gate"), [(2, True), (6, True), (6, False)])
def test_gated_deltanet_is_its_equation(x, factor, value_heads, use_gate):
    options = {"num_value_heads": value_heads, "use_gate": use_gate}
    layer = build(GatedDeltaNet, D, H, allow_negative_eigenvalues=factor == 2, **options)
    q, k, v = project(layer, x, H, value_heads)
    assert (q.shape[-1], v.shape[-1]) == (9, 36 // value_heads)
    b = factor * torch.sigmoid(x @ layer.beta_proj.weight.T)
    dt = F.softplus(x @ layer.decay_proj.weight.T + layer.log_decay.dt_bias)
    a = torch.exp(-layer.log_decay.A_log.exp() * dt)[..., None].expand(-1, -1, -1, q.shape[-1])
    o = rms_norm(delta_rule(q, k, v, a, b), layer.norm.weight)
    if use_gate:
        o = o * F.silu(x @ layer.gate_proj.weight.T).view_as(o)
    assert_close(layer(x), o.flatten(2) @ layer.o_proj.weight.T, 1e-12)


# ---- transformers' own layers, which compute their recurrences in float32, with the weights copied in.


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
