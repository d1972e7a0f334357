"""Small inner mixers, texts for them, and their equations with T x T matrices: what the tests of inner mixers share."""

import itertools
import math

import torch
from registered_mixers import expected_registered

from lm_zoo.linearized.inner import INNER_MIXERS, Context

D, SCALE, ROTARY, HIDDEN = 6, 0.7, 4, 10
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
    "terrace-elu": ("hybrid", {"window": 4, "feature_map": "elu"}),
    "liger": ("liger", {"window": 5, "share": 0.3}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet-qkv": ("gated_deltanet", {"rotary": False, "silu": True, "conv_size": 2}),
    "mamba2": ("mamba2", {}),
    "mamba2-negative": ("mamba2", {"allow_negative_eigenvalues": True, "silu": True}),
    "deltanet": ("deltanet", {"use_gate": True}),
    "deltaproduct": ("deltaproduct", {"gated": True}),
    "kda": ("kda", {}),
    "gla": ("gla", {"gate_rank": 3}),
    "retnet": ("retnet", {}),
    "linear_attention": ("linear_attention", {"rotary": False}),
    "lightning": ("lightning", {"lrpe": False}),
    "lightnet": ("lightnet", {"gate_rank": 3}),
}
HEADS = {"grouped": (4, 2), "plain": (2, 2)}


def make_mixer(name, heads=(4, 2), dtype=torch.float64, **more):
    kind, options = MIXERS[name]
    torch.manual_seed(0)
    mixer = INNER_MIXERS[kind](
        num_heads=heads[0], num_kv_heads=heads[1], head_size=D, scale=SCALE, hidden_size=HIDDEN, **options | more
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer.to(dtype)


class Texts:
    """q, k and v of B texts, after a rotary embedding of some channels that scales too; it, and the layer's input."""

    def __init__(self, batch, length, seed=1, heads=(4, 2), dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def draw(count):
            return torch.randn(batch, length, count, D, dtype=torch.float64, generator=generator)

        self.plain_q, self.plain_k, self.v = draw(heads[0]), draw(heads[1]), draw(heads[1]).to(dtype)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
        self.turn = torch.polar(torch.full_like(angle, 1.2), angle)[None]  # [1, T, R / 2]
        self.hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
        self.q, self.k = self.rotate(self.plain_q).to(dtype), self.rotate(self.plain_k).to(dtype)
        self.rotary = self.turn.real.repeat(1, 1, 2).to(dtype), self.turn.imag.repeat(1, 1, 2).to(dtype)

    def rotate(self, x):
        half = ROTARY // 2
        z = torch.complex(x[..., :half], x[..., half:ROTARY]) * self.turn[:, :, None]
        return torch.cat([z.real, z.imag, x[..., ROTARY:]], dim=-1)

    def requires_grad_(self):
        """Leaves from which q, k and v come."""
        leaves = [x.requires_grad_() for x in (self.plain_q, self.plain_k, self.v)]
        self.q, self.k = self.rotate(self.plain_q), self.rotate(self.plain_k)
        return leaves

    def __getitem__(self, span):
        """q, k, v, the rotary embedding and the layer's input of some tokens."""
        return [x[:, span] for x in (self.q, self.k, self.v, *self.rotary, self.hidden)]


def call(mixer, inputs, state=None, cu_seqlens=None):
    q, k, v, cos, sin, hidden = inputs
    return mixer(q, k, v, context=Context(hidden=hidden, rotary=(cos, sin)), state=state, cu_seqlens=cu_seqlens)


def start(mixer, batch, dtype=torch.float64):
    return mixer.init_state(batch, device=torch.device("cpu"), dtype=dtype)


def gradients(loss, leaves, **options):
    return torch.autograd.grad(loss, leaves, retain_graph=True, **options)  # the rotary embedding is in every graph


def in_parts(mixer, texts, sizes, state):
    bounds = [0, *itertools.accumulate(sizes)]
    return torch.cat([call(mixer, texts[slice(a, b)], state) for a, b in itertools.pairwise(bounds)], dim=1)


def expected_hybrid(mixer, texts):
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
        if not hasattr(feature_map, "weight"):
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


EXPECTED = dict.fromkeys(INNER_MIXERS, expected_registered) | {"hybrid": expected_hybrid, "liger": expected_liger}
