"""Pass 5 backwards as far as the outputs of a chunk go: chunk_output_backward."""

import torch
import triton.language as tl
from torch import Tensor

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

# Launch.block: channels of K and of V in a tile.
TABLE["chunk_output_backward_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
TABLE["chunk_output_backward_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}


def chunk_output_backward(
    do: Tensor, q: Tensor, k: Tensor, G: Tensor | None, A_qk: Tensor | None, scale: float, segment: Segment
) -> Tensor:
    """dv', as far as the outputs of its own chunk go. Without A_qk, which exists for a decay per channel alone, the
    scores are formed here."""
    H, K = q.shape[2:]
    HV, V = do.shape[2:]
    dv_new = torch.empty_like(do)
    entry = launch("chunk_output_backward_kernel", q, max(K, V))
    chunk_output_backward_kernel[segment.chunks, HV](
        do, q, k, G, A_qk, dv_new, scale, segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(entry.block, padded(K)), BLOCK_V=min(entry.block, padded(V)),
        num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return dv_new


@kernel
def chunk_output_backward_kernel(
    do, q, k, G, A_qk, dv_new, scale, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv'_j = sum_{i >= j} A_qk[i,j] dO_i,    A_qk[i,j] = scale q_i^T k_j e^{G_i - G_j}, unless it is given.

    One chunk and one value head per program. Scores stand transposed, as [j, i].
    """
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    length = (end - start).to(tl.int32)
    head = tl.program_id(1)
    shared_head = head // (HV // H)
    i = tl.arange(0, C)
    q, k = q + start * H * K, k + start * H * K
    do, dv_new = do + start * HV * V, dv_new + start * HV * V
    # Past the end G is not known, and e^{G_i - G_j} could overflow on scores that are 0.
    causal = (i[None, :] >= i[:, None]) & (i < length)[None, :]

    if A_qk is None:
        A = tl.zeros([C, C], dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            row = first + tl.arange(0, BLOCK_K)
            keys = load_tokens(k, i, length, shared_head, H, row, K)
            A = dot(keys, load_channels(q, i, length, shared_head, H, row, K), A)
        if G is not None:
            g = load_gates(G + start * HV, i, length, head, HV)
            A *= tl.exp(tl.where(causal, g[None, :] - g[:, None], 0.0))
        A = tl.where(causal, A * scale, 0.0).to(do.dtype.element_ty)
    else:
        A = load_channels(A_qk + start * HV * C, i, length, head, HV, i, C)

    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        dv = dot(A, load_tokens(do, i, length, head, HV, column, V))
        store_tokens(dv_new, dv, i, length, head, HV, column, V)
