"""Pass 5, chunk_output: what each token reads from the state that entered its chunk, and from the chunk itself."""

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

TABLE["chunk_output_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(128, 4, 2), 256: Launch(128, 4, 2)}
TABLE["chunk_output_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
CHANNELS = 64  # of K, in one step of the sum over them


def chunk_output(
    q: Tensor,
    k: Tensor,
    v_new: Tensor,
    G: Tensor | None,
    A_qk: Tensor | None,
    states: Tensor,
    scale: float,
    segment: Segment,
) -> Tensor:
    """Without A_qk, which exists for a decay per channel alone, the scores are formed here."""
    H, K = q.shape[2:]
    HV, V = v_new.shape[2:]
    o = torch.empty_like(v_new)
    entry = launch("chunk_output_kernel", q, max(K, V))
    block = min(entry.block, padded(V))
    chunk_output_kernel[segment.chunks, HV, blocks(V, block)](
        q, k, v_new, G, A_qk, states, o, scale, segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(CHANNELS, padded(K)), BLOCK_V=block, num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return o


@kernel
def chunk_output_kernel(
    q, k, v_new, G, A_qk, states, o, scale, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """O = scale (Q e^G) S + A_qk v',    A_qk[i,j] = scale q_i^T k_j e^{G_i - G_j} for i >= j, unless it is given.

    One chunk, one value head and BLOCK_V channels of it per program. A decay per token is left out of the sum over K
    and multiplies its result; one per channel comes with A_qk.
    """
    m, head = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    start, end = chunk_tokens(m, bounds, T)
    length = (end - start).to(tl.int32)
    i = tl.arange(0, C)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    shared_head = head // (HV // H)
    q, k = q + start * H * K, k + start * H * K
    v_new, o = v_new + start * HV * V, o + start * HV * V
    states += (m * HV + head) * K * V
    keys = tl.where(length > 0, K, 0)  # no state enters an empty chunk

    from_state = tl.zeros([C, BLOCK_V], dtype=tl.float32)
    if A_qk is None:
        A = tl.zeros([C, C], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        x = load_tokens(q, i, length, shared_head, H, row, K)
        if A_qk is None:
            A = dot(x, load_channels(k, i, length, shared_head, H, row, K), A)
        else:
            x = (x.to(tl.float32) * tl.exp(load_tokens(G + start * HV * K, i, length, head, HV, row, K))).to(x.dtype)
        exists = (row < keys)[:, None] & (column < V)[None, :]
        S = tl.load(states + row[:, None] * V + column[None, :], mask=exists, other=0.0)
        from_state = dot(x, S, from_state)

    v = load_tokens(v_new, i, length, head, HV, column, V)
    if A_qk is None:
        causal = i[:, None] >= i[None, :]
        if G is not None:
            g = load_gates(G + start * HV, i, length, head, HV)
            from_state *= tl.exp(g)[:, None]
            A *= tl.exp(tl.minimum(g[:, None] - g[None, :], 0.0))  # above 0 in what is masked below, or past `end`
        A = tl.where(causal, A * scale, 0.0).to(v.dtype)  # scaled first, for the range of float16
    else:
        A = load_tokens(A_qk + start * HV * C, i, length, head, HV, i, C)
    store_tokens(o, dot(A, v, from_state * scale), i, length, head, HV, column, V)
