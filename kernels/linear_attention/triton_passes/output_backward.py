"""Pass 5 backwards, chunk_output_backward: what the outputs of a chunk, and the state it leaves, send to its v'."""

import torch
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import (
    blocks,
    dot,
    load_channels,
    load_gates,
    load_tokens,
    padded,
    store_tokens,
)
from lm_zoo.kernels.triton_kernel import kernel

# Launch.block: channels of V that a program takes. The work is that of `chunk_output`, on scores that stand transposed.
TABLE["chunk_output_backward_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(128, 8, 2), 256: Launch(128, 8, 2)}
TABLE["chunk_output_backward_kernel", "hopper"] = {64: Launch(64, 4, 2), 128: Launch(128, 4, 2), 256: Launch(128, 4, 2)}
TABLE["chunk_output_backward_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
CHANNELS = 64  # of K, in one step of the sum over them


def chunk_output_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    G: Tensor | None,
    A_qk: Tensor | None,
    dstates: Tensor | None,
    scale: float,
    segment: Segment,
) -> Tensor:
    """dv', and without dstates only what the outputs of its own chunk send to it. Without A_qk, which exists for a
    decay per channel alone, the scores are formed here."""
    H, K = q.shape[2:]
    HV, V = do.shape[2:]
    dv_new = torch.empty_like(do)
    entry = launch("chunk_output_backward_kernel", q, max(K, V))
    block = min(entry.block, padded(V))
    chunk_output_backward_kernel[segment.chunks, HV, blocks(V, block)](
        do, q, k, G, A_qk, dstates, dv_new, scale, segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(CHANNELS, padded(K)), BLOCK_V=block, num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return dv_new


@kernel
def chunk_output_backward_kernel(
    do, q, k, G, A_qk, dstates, dv_new, scale, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv' = A_qk^T dO + (K e^{G_C - G}) dS,    A_qk[i,j] = scale q_i^T k_j e^{G_i - G_j} for i >= j, if not given.

    One chunk, one value head and BLOCK_V channels of it per program. Scores stand transposed, as [j, i]. A decay per
    token is left out of the sum over K and multiplies its result; one per channel comes with A_qk.
    """
    m, head = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    start, end = chunk_tokens(m, bounds, T)
    length = (end - start).to(tl.int32)
    last = tl.maximum(length - 1, 0)  # packed calls have chunks without tokens
    i = tl.arange(0, C)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    shared_head = head // (HV // H)
    q, k = q + start * H * K, k + start * H * K
    do, dv_new = do + start * HV * V, dv_new + start * HV * V
    if dstates is not None:
        dstates += (m * HV + head) * K * V
        keys = tl.where(length > 0, K, 0)  # no state leaves an empty chunk

    dv = tl.zeros([C, BLOCK_V], dtype=tl.float32)
    if A_qk is None:
        A = tl.zeros([C, C], dtype=tl.float32)
    if A_qk is None or dstates is not None:
        for first in range(0, K, BLOCK_K):
            row = first + tl.arange(0, BLOCK_K)
            x = load_tokens(k, i, length, shared_head, H, row, K)
            if A_qk is None:
                A = dot(x, load_channels(q, i, length, shared_head, H, row, K), A)
            else:
                gates = G + start * HV * K
                G_end = tl.load(gates + (last * HV + head) * K + row, mask=row < K, other=0.0)
                to_end = G_end[None, :] - load_tokens(gates, i, length, head, HV, row, K)
                x = (x.to(tl.float32) * tl.exp(to_end)).to(x.dtype)
            if dstates is not None:
                exists = (row < keys)[:, None] & (column < V)[None, :]
                dS = tl.load(dstates + row[:, None] * V + column[None, :], mask=exists, other=0.0)
                dv = dot(x, dS, dv)

    outputs = load_tokens(do, i, length, head, HV, column, V)
    if A_qk is None:
        causal = i[None, :] >= i[:, None]
        if G is not None:
            g, G_end = load_gates(G + start * HV, i, length, head, HV), tl.load(G + (start + last) * HV + head)
            dv *= tl.exp(G_end - g)[:, None]
            A *= tl.exp(tl.minimum(g[None, :] - g[:, None], 0.0))  # above 0 in what is masked below, or past `end`
        A = tl.where(causal, A * scale, 0.0).to(outputs.dtype)  # scaled first, for the range of float16
    else:
        A = load_channels(A_qk + start * HV * C, i, length, head, HV, i, C)
    store_tokens(dv_new, dot(A, outputs, dv), i, length, head, HV, column, V)
