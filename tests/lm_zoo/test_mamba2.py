"""Mamba-2 against its paper and transformers' own, layer and whole model; decays of either sign."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from layer_oracles import assert_same_layer, build, conv1d, convolve, rms_norm, same
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers import Mamba2
from lm_zoo.modules.decay import stretched

B, T, D = 2, 70, 24  # T: more than one chunk


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


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
    """Without an MLP, a zoo model is the stack of the paper: norm, mixer, residual."""
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
        ZooConfig(
            vocab_size=61,
            hidden_size=D,
            num_hidden_layers=3,
            intermediate_size=0,
            norm_eps=1e-5,
            mixers={"mamba2": options},
        )
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
            for here, there, arrange in mamba2_pairs(ours.mixer, theirs.mixer):
                here.copy_(arrange(there))
        ids = tokens(2, T)
        expected = other(ids).logits
        assert expected.std() > 0.3
        assert_close(model(ids).logits, expected, 1e-5)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(written, other.generate(ids, max_new_tokens=8, do_sample=False))


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
