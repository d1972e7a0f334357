"""Passes 4 and 5 backwards to q, k, w and the decays: chunk_gradients."""

import torch
import triton
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
for key in ("chunk_gradients_kernel", "chunk_gradients_kernel, per channel"):
    for device_class in ("large", "small"):
        TABLE[key, device_class] = {64: Launch(32, 4, 2), 128: Launch(32, 8, 2), 256: Launch(32, 8, 2)}
    TABLE[key, "hopper"] = {64: Launch(32, 4, 2), 128: Launch(64, 4, 2), 256: Launch(32, 8, 2)}
TABLE["chunk_gradients_kernel", "hopper"][256] = Launch(64, 4, 2)


def chunk_gradients(
    do: Tensor,
    du: Tensor,
    q: Tensor,
    k: Tensor,
    v_new: Tensor,
    G: Tensor | None,
    states: Tensor,
    dstates: Tensor,
    scale: float,
    segment: Segment,
    *,
    delta: bool,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq and dk per value head, dw if `delta`, dG and dlog_decay if `decay_gradient`, and dA_qk if the decay is per
    channel. If it is not, dA_qk is used up here: dq, dk and dG have its share.

    dq and dk are in float32 where a later pass adds to them.
    """
    H, K = q.shape[2:]
    B, T, HV, V = do.shape
    per_channel = G is not None and G.dim() == 4
    dq = q.new_empty(B, T, HV, K, dtype=torch.float32 if per_channel else q.dtype)
    dk = q.new_empty(B, T, HV, K, dtype=torch.float32 if per_channel or delta else q.dtype)
    dw = q.new_empty(B, T, HV, K) if delta else None
    dG, dlog_decay = (torch.empty_like(G), torch.empty_like(G)) if decay_gradient else (None, None)
    dA_qk = q.new_empty(B, T, HV, C.value) if per_channel else None
    entry = launch("chunk_gradients_kernel" + ", per channel" * per_channel, q, max(K, V))
    chunk_gradients_kernel[segment.chunks, HV](
        do, du, q, k, v_new, G, states, dstates, dq, dk, dw, dG, dlog_decay, dA_qk, scale,
        segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(entry.block, padded(K)), BLOCK_V=min(entry.block, padded(V)), PER_CHANNEL=per_channel,
        num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return dq, dk, dw, dG, dlog_decay, dA_qk


@kernel
def chunk_gradients_kernel(
    do, du, q, k, v_new, G, states, dstates, dq, dk, dw, dG, dlog_decay, dA_qk, scale, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """dq = scale e^G (dO S^T)    dk = e^{G_C - G} (v' dS^T)    dw = -du S^T    dA_qk = tril(dO v'^T)

    One chunk and one value head per program. Unless the decay is per channel, with D_ij = scale dA_ij e^{G_i - G_j}
    also dq += D k and dk += D^T q.

    dG is q dq - k dk, but for k dk of the states: what k_i leaves at the chunk's end passes the decays after i, so
    dlog_decay is its sum over i < t. By way of dG, terms of size 1 would have to cancel to leave one of size e^-50. Nor
    does the diagonal of D, which no decay touches, get into dG.
    """
    m, head = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    start, end = chunk_tokens(m, bounds, T)
    length = (end - start).to(tl.int32)
    last = tl.maximum(length - 1, 0)  # packed calls have chunks without tokens
    shared_head = head // (HV // H)
    i = tl.arange(0, C)
    q, k = q + start * H * K, k + start * H * K
    dq, dk = dq + start * HV * K, dk + start * HV * K
    do, v_new = do + start * HV * V, v_new + start * HV * V
    states, dstates = states + (m * HV + head) * K * V, dstates + (m * HV + head) * K * V
    if dw is not None:
        du, dw = du + start * HV * V, dw + start * HV * K
    if G is not None:
        gates: tl.constexpr = K if PER_CHANNEL else 1  # of a token and head
        G += start * HV * gates
        if dG is not None:
            dG, dlog_decay = dG + start * HV * gates, dlog_decay + start * HV * gates
    PER_TOKEN: tl.constexpr = G is not None and not PER_CHANNEL

    D = score_gradients(do, v_new, i, length, head, HV, V, BLOCK_V)
    if PER_CHANNEL:
        store_tokens(dA_qk + start * HV * C, tl.where(i[:, None] >= i[None, :], D, 0.0), i, length, head, HV, i, C)
    else:
        diagonal = tl.sum(tl.where(i[:, None] == i[None, :], D, 0.0), axis=1)[:, None] * scale
        below = (i[:, None] > i[None, :]) & (i < length)[:, None]  # past the end e^{G_i - G_j} could overflow
        D = tl.where(below, D * scale, 0.0)
    if PER_TOKEN:
        g, G_end = load_gates(G, i, length, head, HV), tl.load(G + last * HV + head)
        D *= tl.exp(tl.where(below, g[:, None] - g[None, :], 0.0))
    if PER_TOKEN and dG is not None:
        dG_sum = tl.zeros([C], dtype=tl.float32)
        left = tl.zeros([C], dtype=tl.float32)  # k dk of the states
        through = 0.0  # e^{G_C} S dS: what passes the whole chunk
    D = D.to(q.dtype.element_ty)

    for first in range(0, K, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        dq_tile, dk_tile, dw_tile, passed = state_gradients(
            do, du, v_new, states, dstates, i, length, head, HV, row, K, V, BLOCK_V, dw is not None, dG is not None
        )
        if dw is not None:
            store_tokens(dw, -dw_tile, i, length, head, HV, row, K)
        queries = load_tokens(q, i, length, shared_head, H, row, K)
        keys = load_tokens(k, i, length, shared_head, H, row, K)
        dq_tile *= scale
        if PER_CHANNEL:
            g, G_end = load_tokens(G, i, length, head, HV, row, K), load_last(G, last, head, HV, row, K)
            dk_tile *= tl.exp(G_end[None, :] - g)
            dq_tile *= tl.exp(g)
            if dG is not None:
                store_tokens(dG, queries.to(tl.float32) * dq_tile, i, length, head, HV, row, K)
                passed *= tl.exp(G_end)
                left_before = tl.cumsum(keys.to(tl.float32) * dk_tile, axis=0) + passed[None, :]
                store_tokens(dlog_decay, left_before, i + 1, length, head, HV, row, K)
                tl.store(dlog_decay + head * K + row, passed, mask=row < tl.where(length > 0, K, 0))
        else:
            if PER_TOKEN:
                dq_tile *= tl.exp(g)[:, None]
                dk_tile *= tl.exp(G_end - g)[:, None]
            if PER_TOKEN and dG is not None:
                through += tl.sum(passed, axis=0) * tl.exp(G_end)
                left += tl.sum(keys.to(tl.float32) * dk_tile, axis=1)
            dq_tile = dot(D, keys, dq_tile)
            dk_scores = dot(tl.trans(D), queries)
            if PER_TOKEN and dG is not None:
                dG_sum += tl.sum(queries.to(tl.float32) * dq_tile - keys.to(tl.float32) * dk_scores, axis=1)
            dq_tile += diagonal * keys.to(tl.float32)
            dk_tile += dk_scores + diagonal * queries.to(tl.float32)
        store_tokens(dq, dq_tile, i, length, head, HV, row, K)
        store_tokens(dk, dk_tile, i, length, head, HV, row, K)

    if PER_TOKEN and dG is not None:
        tl.store(dG + i * HV + head, dG_sum, mask=i < length)
        left_before = tl.cumsum(left, axis=0) + through
        tl.store(dlog_decay + (i + 1) * HV + head, left_before, mask=i + 1 < length)
        tl.store(dlog_decay + head, through, mask=length > 0)


@triton.jit
def score_gradients(do, v_new, i, length, head, HV, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """dO v'^T."""
    dA = tl.zeros([i.shape[0], i.shape[0]], dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        outputs = load_tokens(do, i, length, head, HV, column, V)
        dA = dot(outputs, load_channels(v_new, i, length, head, HV, column, V), dA)
    return dA


@triton.jit
def state_gradients(
    do, du, v_new, states, dstates, i, length, head, HV, row,
    K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, DELTA: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """dO S^T, v' dS^T, with DELTA du S^T, and with PASSED sum_v S dS, of the channels `row` of a key."""
    dq = tl.zeros([i.shape[0], row.shape[0]], dtype=tl.float32)
    dk = tl.zeros([i.shape[0], row.shape[0]], dtype=tl.float32)
    dw = tl.zeros([i.shape[0], row.shape[0]], dtype=tl.float32)
    passed = tl.zeros([row.shape[0]], dtype=tl.float32)
    rows = tl.where(length > 0, K, 0)  # a chunk without tokens has no states: what is there, nobody wrote
    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        tile, mask = row[:, None] * V + column[None, :], (row < rows)[:, None] & (column < V)[None, :]
        S = tl.load(states + tile, mask=mask, other=0.0)
        dS = tl.load(dstates + tile, mask=mask, other=0.0)
        dq = dot(load_tokens(do, i, length, head, HV, column, V), tl.trans(S), dq)
        dk = dot(load_tokens(v_new, i, length, head, HV, column, V), tl.trans(dS), dk)
        if DELTA:
            dw = dot(load_tokens(du, i, length, head, HV, column, V), tl.trans(S), dw)
        if PASSED:
            # Loaded once more, and in another way, or it would be the same load. One that feeds a product and registers
            # gets too few buffers: on Hopper, Triton 3.6 to 3.9 loads the next tile over it under the product.
            S = tl.load(states + tile, mask=mask, other=0.0, cache_modifier=".cg")
            dS = tl.load(dstates + tile, mask=mask, other=0.0, cache_modifier=".cg")
            passed += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
    return dq, dk, dw, passed


@triton.jit
def load_last(G, last, head, HV, row, K: tl.constexpr):
    return tl.load(G + (last * HV + head) * K + row, mask=row < K, other=0.0)
