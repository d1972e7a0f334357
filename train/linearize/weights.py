"""The attention weights of a layer, written out: for losses that compare them, which no constant-memory form can do."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lm_zoo.linearized.hybrid import TINY, HybridAttention
from lm_zoo.linearized.inner import Context


def weights_cross_entropy(module: nn.Module, q: Tensor, k: Tensor, context: Context) -> Tensor:
    """- sum_j a_nj log b_nj, the mean over queries and heads: a the teacher's weights, b the mixer's.

    Every pair of tokens of a text is looked at, in memory too: H L^2 numbers for a text of L tokens.
    """
    mixer = module.mixer
    bounds = [0, q.shape[1]] if context.cu_seqlens is None else context.cu_seqlens.tolist()
    total = q.new_zeros((), dtype=torch.float32)
    for start, end in itertools.pairwise(bounds):
        q_text, k_text = q[0, start:end].float(), k[0, start:end].float()
        total = total + _of_text(mixer, module.softmax_window, q_text, k_text)
    return total / (q.shape[1] * q.shape[2])


def _of_text(mixer: HybridAttention, teacher_window: int | None, q: Tensor, k: Tensor) -> Tensor:
    """The sum over queries and heads of one text: q `[L, H, D]`, k `[L, HKV, D]`."""
    scores = mixer.scale * _products(q, k)
    token = torch.arange(len(q), device=q.device)
    distance = token[:, None] - token
    causal = distance >= 0
    seen = causal if teacher_window is None else causal & (distance < teacher_window)
    target = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return -(target * mixer_weights(mixer, scores, q, k, distance).clamp_min(TINY).log()).sum()


def mixer_weights(mixer: HybridAttention, scores: Tensor, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
    """What the mixer weighs each earlier token of a text with, `[H, L, L]`: every row sums to 1."""
    repeats = mixer.state_heads // mixer.num_kv_heads
    phi_k = mixer.k_map(k[None].repeat_interleave(repeats, dim=2))[0]
    weights = _products(mixer.q_map(q[None])[0], phi_k)
    if mixer.window:
        near = (distance >= 0) & in_window(distance, mixer.window, mixer.window_kind)
        in_view = scores.masked_fill(~near, float("-inf"))
        gamma = mixer.window_gate.float().sigmoid()[:, None, None]
        beta = 1.0 if mixer.beta == "one" else 1 - gamma
        window = gamma * (in_view - in_view.amax(dim=-1, keepdim=True)).exp()
        weights = torch.where(near, window, beta * weights)
    weights = weights * (distance >= 0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(TINY)


def in_window(distance: Tensor, window: int, kind: str) -> Tensor:
    """Whether a query sees a token through the window: the last w tokens, or its own block of w and the one before.

    `distance` is `[L, L]`: how far back each token is, in a text from its beginning.
    """
    if kind == "sliding":
        return distance < window
    block = torch.arange(len(distance), device=distance.device) // window
    return block[:, None] - block <= 1


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q_h . k_{h / G}: `[L, H, D]` and `[L, HK, D]` to `[H, L, L]`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return q.transpose(0, 1) @ k.permute(1, 2, 0)
