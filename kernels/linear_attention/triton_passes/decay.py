"""Pass 1, cumulative_decay: G_i = sum_{t <= i} g_t inside each chunk, and its gradient."""

import torch
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import blocks
from lm_zoo.kernels.triton_kernel import kernel

# e^-104 is 0 in float32: below the floor a decay forgets everything, as -inf does.
DECAY_FLOOR = -104.0
CHANNELS = 64  # gates that a program sums side by side


def cumulative_decay(log_decay: Tensor, segment: Segment) -> Tensor:
    """In float32, `[B, T, HV]` or `[B, T, HV, K]`: over 64 tokens it keeps differences to 2^-24 of their sum."""
    G = torch.empty_like(log_decay, dtype=torch.float32)
    D = log_decay[0, 0].numel()
    grid = segment.chunks, blocks(D, CHANNELS)
    cumulative_decay_kernel[grid](
        log_decay, G, segment.bounds, segment.length, D, FLOOR=DECAY_FLOOR, CHANNELS=CHANNELS, num_warps=4
    )
    return G


def cumulative_decay_backward(dG: Tensor, dlog_decay: Tensor, log_decay: Tensor, segment: Segment) -> Tensor:
    """dlog_decay is what reaches the decays past G (`chunk_gradients`)."""
    out = torch.empty_like(log_decay)
    D = log_decay[0, 0].numel()
    grid = segment.chunks, blocks(D, CHANNELS)
    cumulative_decay_backward_kernel[grid](
        dG, dlog_decay, log_decay, out, segment.bounds, segment.length, D,
        FLOOR=DECAY_FLOOR, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


@kernel
def cumulative_decay_kernel(log_decay, G, bounds, T, D, FLOOR: tl.constexpr, CHANNELS: tl.constexpr):
    """G_i = sum_{t <= i} max(g_t, floor), one chunk and some of the D gates of a token per program."""
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    token = start + tl.arange(0, C)
    gate = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (token < end)[:, None] & (gate < D)[None, :]
    at = token[:, None] * D + gate[None, :]
    g = tl.load(log_decay + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(G + at, tl.cumsum(tl.maximum(g, FLOOR), axis=0), mask=mask)


@kernel
def cumulative_decay_backward_kernel(
    dG, dlog_decay, log_decay, out, bounds, T, D, FLOOR: tl.constexpr, CHANNELS: tl.constexpr
):
    """dg_t = sum_{i >= t} dG_i + dlog_decay_t, and 0 below the floor."""
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    token = start + tl.arange(0, C)
    gate = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (token < end)[:, None] & (gate < D)[None, :]
    at = token[:, None] * D + gate[None, :]
    g = tl.load(log_decay + at, mask=mask, other=0.0).to(tl.float32)
    dg = tl.cumsum(tl.load(dG + at, mask=mask, other=0.0), axis=0, reverse=True)
    dg += tl.load(dlog_decay + at, mask=mask, other=0.0)
    tl.store(out + at, tl.where(g < FLOOR, 0.0, dg), mask=mask)
