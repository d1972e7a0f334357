"""Pass 4, chunk_states: the state that enters each chunk, and what each chunk writes. The only sequential pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens, sequence_chunks
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

# Launch.block: columns of the state that a program carries, with all their K rows.
for gates in ("", ", per channel"):
    for key in ("chunk_states_kernel" + gates, "chunk_states_kernel, additive" + gates):
        TABLE[key, "large"] = {64: Launch(64, 4, 2), 128: Launch(32, 8, 2), 256: Launch(32, 8, 2)}
        TABLE[key, "hopper"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(32, 8, 2)}
        TABLE[key, "small"] = {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 8, 1)}
TABLE["chunk_states_kernel, additive", "hopper"][128] = Launch(32, 4, 2)
TABLE["chunk_states_kernel, additive, per channel", "hopper"][256] = Launch(64, 8, 2)


def chunk_states(
    k: Tensor, u: Tensor, w: Tensor | None, G: Tensor | None, state: Tensor, segment: Segment
) -> tuple[Tensor, Tensor]:
    """The state entering each chunk, `[M, HV, K, V]` in the dtype of k, and v'; `state` is carried on in place."""
    H, K = k.shape[2:]
    HV, V = u.shape[2:]
    states = k.new_empty(segment.chunks, HV, K, V)
    v_new = u if w is None else torch.empty_like(u)
    per_channel = G is not None and G.dim() == 4
    entry = launch("chunk_states_kernel" + ", additive" * (w is None) + ", per channel" * per_channel, k, K)
    block = min(entry.block, padded(V))
    chunk_states_kernel[segment.sequences, HV, blocks(V, block)](
        k, u, w, G, state, states, v_new, segment.bounds, segment.first_chunk, segment.length, H, HV,
        K=K, V=V, BLOCK_K=padded(K), BLOCK_V=block, PER_CHANNEL=per_channel,
        num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return states, v_new


@triton.jit
def sequence_tokens(first, last, bounds, T):
    """Start and end of the sequence of chunks first to last among the B T tokens; an empty one starts anywhere."""
    start, _ = chunk_tokens(first, bounds, T)
    _, end = chunk_tokens(tl.maximum(first, last - 1), bounds, T)
    return start, end


@kernel
def chunk_states_kernel(
    k, u, w, G, state, states, v_new, bounds, first_chunk, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """v' = u - w S,    S <- Diag(e^{G_C}) S + (K e^{G_C - G})^T v',    chunk after chunk of one sequence.

    A program owns BLOCK_V columns of the state of one value head, which do not depend on the others, and keeps them in
    registers with all K rows. Without `w`, v' is u.
    """
    n, head = tl.program_id(0), tl.program_id(1)
    first, last = sequence_chunks(n, first_chunk, T)
    start, end = sequence_tokens(first, last, bounds, T)
    row = tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = row[:, None] * V + column[None, :]
    mask = (row < K)[:, None] & (column < V)[None, :]
    state += (tl.cast(n, tl.int64) * HV + head) * K * V + tile
    states += (first * HV + head) * K * V + tile
    S = tl.load(state, mask=mask, other=0.0)

    for m in range(0, tl.cast(last - first, tl.int32)):
        # 64-bit: offsets from the first token would be kept across the loop, in registers that it does not have.
        token = start + m * C + tl.arange(0, C)
        last_token = tl.minimum(start + m * C + C, end) - 1
        S_in = S.to(k.dtype.element_ty)
        tl.store(states + tl.cast(m, tl.int64) * HV * K * V, S_in, mask=mask)
        v = load_tokens(u, token, end, head, HV, column, V)
        if w is not None:
            v = (v.to(tl.float32) - dot(load_tokens(w, token, end, head, HV, row, K), S_in)).to(v.dtype)
            store_tokens(v_new, v, token, end, head, HV, column, V)
        k_end = load_channels(k, token, end, head // (HV // H), H, row, K)
        # Beyond `end` G reads 0: an exponent of G_C there, on keys and values that are 0.
        if PER_CHANNEL:
            G_end = tl.load(G + (last_token * HV + head) * K + row, mask=row < K, other=0.0)
            to_end = G_end[:, None] - load_channels(G, token, end, head, HV, row, K)
            k_end = (k_end.to(tl.float32) * tl.exp(to_end)).to(v.dtype)
            S *= tl.exp(G_end)[:, None]
        elif G is not None:
            G_end = tl.load(G + last_token * HV + head)
            v = (v.to(tl.float32) * tl.exp(G_end - load_gates(G, token, end, head, HV))[:, None]).to(v.dtype)
            S *= tl.exp(G_end)
        S = dot(k_end, v, S)
    tl.store(state, S, mask=mask)
