"""Pass 3, delta_transform: T = (I + diag(beta) A_kk)^-1, and delta_apply, what it makes of values and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import (
    dot,
    load_gates,
    load_tokens,
    padded,
    store_tokens,
)

TABLE["delta_apply_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
TABLE["delta_apply_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
BLOCK: tl.constexpr = tl.constexpr(16)  # of the inverse: a chunk has 4 x 4
# Products with the accuracy of float32, on matrix units: each factor as a sum of three bfloat16. The interpreter, which
# does not know it, computes in float32.
ACCURATE = "bf16x6"


def delta_transform(A_kk: Tensor, beta: Tensor, segment: Segment) -> Tensor:
    """In the dtype of q, computed in float32; A_kk may have fewer heads, then it is shared by groups of value heads."""
    B, T, HV = beta.shape
    transform = A_kk.new_empty(B, T, HV, C.value, dtype=segment.dtype)
    delta_transform_kernel[segment.chunks, HV](
        A_kk, beta, transform, segment.bounds, segment.length, A_kk.shape[2], HV,
        PRECISION="ieee" if triton.knobs.runtime.interpret else ACCURATE, num_warps=1, num_stages=1,
    )  # fmt: skip
    return transform


def delta_apply(
    T: Tensor, k: Tensor, v: Tensor, G: Tensor | None, beta: Tensor, segment: Segment
) -> tuple[Tensor, Tensor]:
    """u = T diag(beta) V, w = T diag(beta) (K e^G)."""
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    u, w = torch.empty_like(v), k.new_empty(*k.shape[:2], HV, K)
    entry = launch("delta_apply_kernel", k, max(K, V))
    delta_apply_kernel[segment.chunks, HV](
        T, k, v, G, beta, u, w, segment.bounds, segment.length, H, HV,
        K=K, V=V, BLOCK_K=min(entry.block, padded(K)), BLOCK_V=min(entry.block, padded(V)),
        PER_CHANNEL=G is not None and G.dim() == 4, num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return u, w


@triton.jit
def delta_transform_kernel(A_kk, beta, transform, bounds, T, HA, HV, PRECISION: tl.constexpr):
    """T = (I + L)^-1 with L = diag(beta) A_kk, one chunk and one value head per program.

    In blocks of 16: those on the diagonal are T_ii = (I + L_ii)^-1, those below follow from what stands above them,
    T_ij = -T_ii sum_{j <= n < i} L_in T_nj. All of it has the accuracy of substitution in float32; a series in powers
    of L would have to cancel.
    """
    head = tl.program_id(1)
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    length = (end - start).to(tl.int32)
    A_kk += (start * HA + head // (HV // HA)) * C
    beta += start * HV + head
    transform += (start * HV + head) * C

    T00 = block_inverse(load_block(A_kk, beta, 0, 0, length, HA, HV), PRECISION)
    T11 = block_inverse(load_block(A_kk, beta, 1, 1, length, HA, HV), PRECISION)
    T22 = block_inverse(load_block(A_kk, beta, 2, 2, length, HA, HV), PRECISION)
    T33 = block_inverse(load_block(A_kk, beta, 3, 3, length, HA, HV), PRECISION)
    L10 = load_block(A_kk, beta, 1, 0, length, HA, HV)
    L20 = load_block(A_kk, beta, 2, 0, length, HA, HV)
    L21 = load_block(A_kk, beta, 2, 1, length, HA, HV)
    L30 = load_block(A_kk, beta, 3, 0, length, HA, HV)
    L31 = load_block(A_kk, beta, 3, 1, length, HA, HV)
    L32 = load_block(A_kk, beta, 3, 2, length, HA, HV)
    T10 = -product(T11, product(L10, T00, PRECISION), PRECISION)
    T21 = -product(T22, product(L21, T11, PRECISION), PRECISION)
    T32 = -product(T33, product(L32, T22, PRECISION), PRECISION)
    T20 = -product(T22, product(L20, T00, PRECISION) + product(L21, T10, PRECISION), PRECISION)
    T31 = -product(T33, product(L31, T11, PRECISION) + product(L32, T21, PRECISION), PRECISION)
    sum30 = product(L30, T00, PRECISION) + product(L31, T10, PRECISION) + product(L32, T20, PRECISION)
    T30 = -product(T33, sum30, PRECISION)

    zero = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    store_blocks(transform, 0, T00, zero, zero, zero, length, HV)
    store_blocks(transform, 1, T10, T11, zero, zero, length, HV)
    store_blocks(transform, 2, T20, T21, T22, zero, length, HV)
    store_blocks(transform, 3, T30, T31, T32, T33, length, HV)


@triton.jit
def block_inverse(L, PRECISION: tl.constexpr):
    """X = (I + L)^-1 of a block. Its own blocks on the diagonal are inverted first, of size 2, 4, 8 and 16: with E what
    of L the doubled size adds, X <- X - X E X, which is -Q^-1 R P^-1 below the diagonal of [[P, 0], [R, Q]]."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    X = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, L, 0.0)
    for level in tl.static_range(1, 4):
        added = (row >> level != column >> level) & (row >> (level + 1) == column >> (level + 1))
        X -= product(X, product(tl.where(added, L, 0.0), X, PRECISION), PRECISION)
    return X


@triton.jit
def load_block(A_kk, beta, row: tl.constexpr, column: tl.constexpr, length, HA, HV):
    """Block (row, column) of L = diag(beta) A_kk, 0 past the end of the chunk."""
    i = tl.arange(0, BLOCK)
    token = row * BLOCK + i
    A = tl.load(A_kk + token[:, None] * HA * C + column * BLOCK + i[None, :], mask=(token < length)[:, None], other=0.0)
    return A.to(tl.float32) * load_gates(beta, token, length, 0, HV)[:, None]


@triton.jit
def store_blocks(transform, row: tl.constexpr, a, b, c, d, length, HV):
    """The four blocks of a row, next to each other."""
    token = row * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, BLOCK)
    at = transform + token[:, None] * HV * C + i[None, :]
    mask = (token < length)[:, None]
    dtype: tl.constexpr = transform.dtype.element_ty
    tl.store(at, a.to(dtype), mask=mask)
    tl.store(at + BLOCK, b.to(dtype), mask=mask)
    tl.store(at + 2 * BLOCK, c.to(dtype), mask=mask)
    tl.store(at + 3 * BLOCK, d.to(dtype), mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def delta_apply_kernel(
    transform, k, v, G, beta, u, w, bounds, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """u = T diag(beta) V,    w = T diag(beta) (K e^G), one chunk and one value head per program.

    beta, and a decay per token, multiply the columns of T: those products are formed once for all channels.
    """
    head = tl.program_id(1)
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    length = (end - start).to(tl.int32)
    i = tl.arange(0, C)
    k, w = k + start * H * K, w + start * HV * K
    v, u = v + start * HV * V, u + start * HV * V
    weighted = load_tokens(transform + start * HV * C, i, length, head, HV, i, C).to(tl.float32)
    weighted *= load_gates(beta + start * HV, i, length, head, HV)[None, :]
    for_values = weighted.to(v.dtype.element_ty)
    for first in range(0, V, BLOCK_V):
        channel = first + tl.arange(0, BLOCK_V)
        x = load_tokens(v, i, length, head, HV, channel, V)
        store_tokens(u, dot(for_values, x), i, length, head, HV, channel, V)
    if G is not None and not PER_CHANNEL:
        weighted *= tl.exp(load_gates(G + start * HV, i, length, head, HV))[None, :]
    for_keys = weighted.to(k.dtype.element_ty)
    for first in range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        x = load_tokens(k, i, length, head // (HV // H), H, channel, K)
        if PER_CHANNEL:
            x = (x.to(tl.float32) * tl.exp(load_tokens(G + start * HV * K, i, length, head, HV, channel, K))).to(
                x.dtype
            )
        store_tokens(w, dot(for_keys, x), i, length, head, HV, channel, K)
