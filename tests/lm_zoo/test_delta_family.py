"""DeltaNet, Gated DeltaNet, DeltaProduct, KDA and Mamba-2 against their papers and transformers' own layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from transformers import Mamba2Config, Mamba2ForCausalLM, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers import DeltaNet, GatedDeltaNet, Mamba2

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
