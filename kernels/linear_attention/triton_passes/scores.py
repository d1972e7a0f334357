"""Pass 2, chunk_scores, and what of its results the backward pass wants."""

import torch
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.channel_scores import channel_scores
from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import (
    dot,
    load_channels,
    load_gates,
    load_tokens,
    padded,
    store_tokens,
)
from lm_zoo.kernels.triton_kernel import kernel

TABLE["key_scores_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
TABLE["key_scores_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}


def saved_dtypes(q: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> list[torch.dtype | None]:
    """Of A_qk, A_kk and T as the backward pass wants them; `None` for what it forms again."""
    per_channel, delta = log_decay is not None and log_decay.dim() == 4, beta is not None
    return [q.dtype if saved else None for saved in (per_channel, per_channel and delta, delta)]


def chunk_scores(
    q: Tensor, k: Tensor, G: Tensor | None, scale: float, segment: Segment, *, delta: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A_qk for a decay per channel, else `None`: then `chunk_output` forms it. A_kk if `delta`, in float32."""
    if G is not None and G.dim() == 4:
        return channel_scores(q, k, G, scale, segment, delta=delta)
    if not delta:
        return None, None
    H, K = k.shape[2:]
    HV = H if G is None else G.shape[2]  # without decay, the value heads of a group share their scores
    A_kk = k.new_empty(*k.shape[:2], HV, C.value, dtype=torch.float32)
    entry = launch("key_scores_kernel", k, K)
    key_scores_kernel[segment.chunks, HV](
        k, G, A_kk, segment.bounds, segment.length, H, HV,
        K=K, BLOCK_K=min(entry.block, padded(K)), num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return None, A_kk


@kernel
def key_scores_kernel(k, G, A_kk, bounds, T, H, HV, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A_kk[i,j] = k_i^T k_j e^{G_i - G_j} for i > j, of one chunk and one value head per program."""
    head = tl.program_id(1)
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    length = (end - start).to(tl.int32)
    i = tl.arange(0, C)
    k += start * H * K
    shared_head = head // (HV // H)
    A = tl.zeros([C, C], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        rows = load_tokens(k, i, length, shared_head, H, channel, K)
        A = dot(rows, load_channels(k, i, length, shared_head, H, channel, K), A)
    later = i[:, None] > i[None, :]
    if G is not None:
        g = load_gates(G + start * HV, i, length, head, HV)
        A *= tl.exp(tl.minimum(g[:, None] - g[None, :], 0.0))  # above 0 in what is masked below, or past `end`
    store_tokens(A_kk + start * HV * C, tl.where(later, A, 0.0), i, length, head, HV, i, C)
