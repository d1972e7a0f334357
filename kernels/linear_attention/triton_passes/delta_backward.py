"""Pass 3 backwards: delta_transform_backward."""

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
TABLE["delta_transform_backward_kernel", "large"] = {64: Launch(32, 4, 2), 128: Launch(32, 4, 2), 256: Launch(32, 4, 2)}
TABLE["delta_transform_backward_kernel", "small"] = {64: Launch(32, 4, 2), 128: Launch(32, 4, 2), 256: Launch(32, 4, 2)}


def delta_transform_backward(
    du: Tensor,
    dw: Tensor,
    T: Tensor,
    u: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor | None,
    beta: Tensor,
    A_kk: Tensor | None,
    dk: Tensor,
    dG: Tensor | None,
    segment: Segment,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dA_kk, dv, dbeta; adds to dk, and to dG if there is one. A_kk is read with a decay per channel alone; without one
    it is formed here, and so is what dA_kk sends to dk and dG: then dA_kk is None."""
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    dv = torch.empty_like(v)
    dbeta = torch.empty_like(beta, dtype=torch.float32)
    per_channel = G is not None and G.dim() == 4
    dA_kk = torch.empty_like(A_kk) if per_channel else None
    entry = launch("delta_transform_backward_kernel", k, max(K, V))
    delta_transform_backward_kernel[segment.chunks, HV](
        du, dw, T, u, w, k, v, G, beta, A_kk, dk, dG, dA_kk, dv, dbeta, segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(entry.block, padded(K)), BLOCK_V=min(entry.block, padded(V)), PER_CHANNEL=per_channel,
        num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return dA_kk, dv, dbeta


@kernel
def delta_transform_backward_kernel(
    du, dw, T_delta, u, w, k, v, G, beta, A_kk, dk, dG, dA_kk, dv, dbeta, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """dX_v = T^T du    dX_k = T^T dw    dB = -strict_tril(dX_v u^T + dX_k w^T), the gradient of diag(beta) A_kk

    dv = beta dX_v    dk += beta e^G dX_k    dbeta = dX_v v + dX_k (k e^G) + dB A_kk, summed over the row of a token

    One chunk and one value head per program. Unless the decay is per channel, with D_ij = beta_i dB_ij e^{G_i - G_j}
    also dk += D k + D^T k, and G moves with the first term and against the second.
    """
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    head = tl.program_id(1)
    length = (end - start).to(tl.int32)
    shared_head = head // (HV // H)
    i = tl.arange(0, C)
    du, u, v, dv = du + start * HV * V, u + start * HV * V, v + start * HV * V, dv + start * HV * V
    dw, w, dk, k = dw + start * HV * K, w + start * HV * K, dk + start * HV * K, k + start * H * K
    if G is not None:
        gates: tl.constexpr = K if PER_CHANNEL else 1  # of a token and head
        G += start * HV * gates
        if dG is not None:
            dG += start * HV * gates
    strength = load_gates(beta + start * HV, i, length, head, HV)
    transform = load_channels(T_delta + start * HV * C, i, length, head, HV, i, C)  # T^T

    dB, dbeta_sum = value_gradients(du, u, v, dv, transform, strength, i, length, head, HV, V, BLOCK_V)
    if not PER_CHANNEL:
        A = tl.zeros([C, C], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        dX = dot(transform, load_tokens(dw, i, length, head, HV, row, K))
        dB = dot(dX.to(w.dtype.element_ty), load_channels(w, i, length, head, HV, row, K), dB)
        if not PER_CHANNEL:
            keys = load_tokens(k, i, length, shared_head, H, row, K)
            A = dot(keys, tl.trans(keys), A)

    below = (i[:, None] > i[None, :]) & (i < length)[:, None]  # past the end e^{G_i - G_j} could overflow
    dB = tl.where(below, -dB, 0.0)
    if not PER_CHANNEL:
        g = tl.zeros([C], dtype=tl.float32) if G is None else load_gates(G, i, length, head, HV)
        decay = tl.exp(tl.where(below, g[:, None] - g[None, :], 0.0))
        dbeta_sum += tl.sum(dB * (A * decay), axis=1)
        D = (dB * strength[:, None] * decay).to(k.dtype.element_ty)
        dG_sum = tl.zeros([C], dtype=tl.float32)
    else:
        A = load_tokens(A_kk + start * HV * C, i, length, head, HV, i, C).to(tl.float32)
        dbeta_sum += tl.sum(dB * A, axis=1)
        store_tokens(dA_kk + start * HV * C, dB * strength[:, None], i, length, head, HV, i, C)

    for first in range(0, K, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        dX = dot(transform, load_tokens(dw, i, length, head, HV, row, K))
        keys = load_tokens(k, i, length, shared_head, H, row, K)
        if PER_CHANNEL:
            dX *= tl.exp(load_tokens(G, i, length, head, HV, row, K))
        elif G is not None:
            dX *= tl.exp(g)[:, None]
        dbeta_sum += tl.sum(dX * keys.to(tl.float32), axis=1)
        dk_tile = dX * strength[:, None]
        if PER_CHANNEL:
            if dG is not None:
                x = keys.to(tl.float32) * dk_tile
                store_tokens(dG, load_tokens(dG, i, length, head, HV, row, K) + x, i, length, head, HV, row, K)
        else:
            dk_tile = dot(D, keys, dk_tile)
            if dG is not None:
                dG_sum += tl.sum(keys.to(tl.float32) * dk_tile, axis=1)
            as_column = dot(tl.trans(D), keys)
            if dG is not None:
                dG_sum -= tl.sum(keys.to(tl.float32) * as_column, axis=1)
            dk_tile += as_column
        dk_tile += load_tokens(dk, i, length, head, HV, row, K)
        store_tokens(dk, dk_tile, i, length, head, HV, row, K)

    tl.store(dbeta + (start + i) * HV + head, dbeta_sum, mask=i < length)
    if dG is not None and not PER_CHANNEL:
        dG_sum += load_gates(dG, i, length, head, HV)
        tl.store(dG + i * HV + head, dG_sum, mask=i < length)


@triton.jit
def value_gradients(
    du, u, v, dv, transform, strength, i, length, head, HV, V: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Writes dv; dX_v u^T, and dX_v v summed over the row of a token."""
    dB = tl.zeros([i.shape[0], i.shape[0]], dtype=tl.float32)
    dbeta_sum = tl.zeros([i.shape[0]], dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        dX = dot(transform, load_tokens(du, i, length, head, HV, column, V))
        dB = dot(dX.to(u.dtype.element_ty), load_channels(u, i, length, head, HV, column, V), dB)
        dbeta_sum += tl.sum(dX * load_tokens(v, i, length, head, HV, column, V).to(tl.float32), axis=1)
        store_tokens(dv, dX * strength[:, None], i, length, head, HV, column, V)
    return dB, dbeta_sum
