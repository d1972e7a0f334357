"""The layers against their papers' equations, written out plainly in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo import GatedLinearAttention, MultiScaleRetention, SoftmaxAttention

B, T, D, H = 2, 11, 24, 2


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def heads(x, count=H):
    return x.view(*x.shape[:2], count, -1)


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, base=10000.0):
    """Channel pairs (d, d + K/2) at position t as complex numbers, times exp(i t base^(-2d/K))."""
    size = x.shape[-1] // 2
    angles = [[t * base ** (-d / size) for d in range(size)] for t in range(x.shape[1])]
    turn = torch.tensor(angles, dtype=torch.float64)[:, None]
    z = torch.complex(x[..., :size], x[..., size:]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([z.real, z.imag], dim=-1)


def test_gated_linear_attention(x):
    layer = GatedLinearAttention(D, H, expand_k=0.5, expand_v=1.5, gate_rank=3, gate_logit_normalizer=8).double()
    torch.nn.init.normal_(layer.norm.weight)
    q, k, v = (heads(F.linear(x, proj.weight)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert q.shape[-1] == 6
    assert v.shape[-1] == 18
    low, high = layer.decay_proj
    alpha = heads(torch.sigmoid(x @ low.weight.T @ high.weight.T + high.bias) ** (1 / 8))
    S = torch.zeros(B, H, 6, 18, dtype=torch.float64)
    outputs = []
    for t in range(T):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / math.sqrt(6)
        gate = F.silu(heads(F.linear(x[:, t : t + 1], layer.gate_proj.weight))[:, 0])
        outputs.append((rms_norm(o, layer.norm.weight, 1e-5) * gate).flatten(1) @ layer.o_proj.weight.T)
    assert_close(layer(x), torch.stack(outputs, dim=1), 1e-12)


def test_retention_in_its_parallel_form(x):
    """(Q K^T * D) V with D_ts = gamma^(t - s): the paper's first definition, not the recurrence that the layer runs."""
    layer = MultiScaleRetention(D, H).double()
    torch.nn.init.normal_(layer.norm.weight)
    q, k, v = (heads(F.linear(x, proj.weight)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q), rotate(k)
    assert v.shape[-1] == 2 * D // H
    outputs = []
    for h in range(H):
        gamma = 1 - 2.0 ** (-5 - h)
        powers = [[gamma ** (t - s) if s <= t else 0.0 for s in range(T)] for t in range(T)]
        decay = torch.tensor(powers, dtype=torch.float64)
        scores = torch.einsum("btk,bsk->bts", q[:, :, h], k[:, :, h]) / math.sqrt(D / H)
        outputs.append(rms_norm((scores * decay) @ v[:, :, h], layer.norm.weight, 1e-5))
    y = torch.cat(outputs, dim=-1) * F.silu(x @ layer.gate_proj.weight.T)
    assert_close(layer(x), y @ layer.o_proj.weight.T, 1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 11, 50])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_softmax_attention(x, window, kv_heads):
    layer = SoftmaxAttention(D, 4, num_kv_heads=kv_heads, window=window).double()
    q = rotate(heads(F.linear(x, layer.q_proj.weight), 4))
    k = rotate(heads(F.linear(x, layer.k_proj.weight), kv_heads)).repeat_interleave(4 // kv_heads, dim=2)
    v = heads(F.linear(x, layer.v_proj.weight), kv_heads).repeat_interleave(4 // kv_heads, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(D / 4)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (window or T))
    o = torch.einsum("bhts,bshk->bthk", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    expected = o.flatten(2) @ layer.o_proj.weight.T
    assert_close(layer(x), expected, 1e-12)

    state = layer.init_state(B)
    with torch.no_grad():  # through the ring, or the growing buffer
        parts = [layer(part, state=state) for part in x.split([2, 1, 1, 5, 1, 1], dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, 1e-12)


def test_positions_stay_exact_in_a_long_text():
    """Scores depend on distances only, also where float32 angles would be off by half a radian."""
    layer = MultiScaleRetention(D, H)
    x = torch.randn(1, 6, D, generator=torch.Generator().manual_seed(0))
    state = layer.init_state(1)
    state["position"].fill_(10_000_000)
    assert_close(layer(x, state=state), layer(x), 1e-5)


def test_a_softmax_state_grows_by_a_quarter():
    layer = SoftmaxAttention(D, 4, num_kv_heads=2)
    state = layer.init_state(1)
    sizes = []
    with torch.no_grad():
        for _ in range(100):
            layer(torch.zeros(1, 30, D), state=state)
            assert state["keys"].shape == state["values"].shape
            sizes.append(state["keys"].shape[2])
    assert all(length <= size <= length * 1.25 + 64 for length, size in zip(range(30, 3001, 30), sizes, strict=True))
    assert len(set(sizes)) < 20  # copied rarely
