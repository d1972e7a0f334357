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
from lm_zoo.kernels.triton_kernel import kernel

TABLE["delta_apply_kernel", "large"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
TABLE["delta_apply_kernel", "small"] = {64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(64, 4, 2)}
BLOCK: tl.constexpr = tl.constexpr(16)  # of the inverse: a chunk has 4 x 4


def delta_transform(A_kk: Tensor, beta: Tensor, segment: Segment) -> Tensor:
    """In the dtype of q, from float32; A_kk may have fewer heads, then it is shared by groups of value heads."""
    B, T, HV = beta.shape
    transform = A_kk.new_empty(B, T, HV, C.value, dtype=segment.dtype)
    # On matrix units, each factor the sum of three bfloat16, as accurate as float32, or of two, where T is rounded to
    # bfloat16 anyway. The interpreter knows neither.
    precision = "bf16x3" if segment.dtype == torch.bfloat16 else "bf16x6"
    delta_transform_kernel[segment.chunks, HV](
        A_kk, beta, transform, segment.bounds, segment.length, A_kk.shape[2], HV,
        PRECISION="ieee" if triton.knobs.runtime.interpret else precision, num_warps=2, num_stages=1,
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


@kernel
def delta_transform_kernel(A_kk, beta, transform, bounds, T, HA, HV, PRECISION: tl.constexpr):
    """T = (I + L)^-1 with L = diag(beta) A_kk, one chunk and one value head per program.

    The blocks of 16 on the diagonal are inverted first, then those of 32 and the whole from their halves. That is as
    accurate as substitution; a series in powers of L would have to cancel.

    All blocks of one size are one batched tile, and the levels inside the blocks of 16 are a loop that stays one:
    written out one by one, the products take the compiler 20 s and more.
    """
    head = tl.program_id(1)
    start, end = chunk_tokens(tl.program_id(0), bounds, T)
    length = (end - start).to(tl.int32)
    A_kk += (start * HA + head // (HV // HA)) * C
    beta += start * HV + head
    transform += start * HV * C

    X = small_inverses(load_blocks(A_kk, beta, BLOCK, BLOCK, 0, length, HA, HV), PRECISION)
    X = inverses(X, load_blocks(A_kk, beta, BLOCK, 2 * BLOCK, BLOCK, length, HA, HV), PRECISION)
    X = inverses(X, load_blocks(A_kk, beta, 2 * BLOCK, 4 * BLOCK, 2 * BLOCK, length, HA, HV), PRECISION)
    i = tl.arange(0, C)
    store_tokens(transform, tl.reshape(X, [C, C]), i, length, head, HV, i, C)


@triton.jit
def small_inverses(L, PRECISION: tl.constexpr):
    """X = (I + L)^-1 of blocks `[4, 16, 16]`. Their own blocks on the diagonal are inverted first, of size 2, 4, 8 and
    16: with E what of L the doubled size adds, X <- X - X E X, as in `inverses`."""
    i = tl.arange(0, BLOCK)
    differ = (i[:, None] ^ i[None, :])[None, :, :]  # its highest bit is the level
    X = tl.where(differ == 0, 1.0, 0.0) - tl.where(differ == 1, L, 0.0)
    for level in range(1, 4):
        E = tl.where(differ >> level == 1, L, 0.0)
        X -= product(X, product(E, X, PRECISION), PRECISION)
    return X


@triton.jit
def inverses(X, R, PRECISION: tl.constexpr):
    """[[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]], blocks `[n, 2s, 2s]` of X `[2n, s, s]`, which holds P^-1
    and Q^-1 in turn, and R `[n, s, s]`."""
    n: tl.constexpr = R.shape[0]
    s: tl.constexpr = R.shape[1]
    P, Q = tl.split(tl.permute(tl.reshape(X, [n, 2, s, s]), 0, 2, 3, 1))
    upper = tl.join(P, tl.zeros_like(P))
    lower = tl.join(-product(Q, product(R, P, PRECISION), PRECISION), Q)
    return tl.reshape(tl.permute(tl.join(upper, lower), 0, 4, 1, 3, 2), [n, 2 * s, 2 * s])


@triton.jit
def load_blocks(A_kk, beta, SIZE: tl.constexpr, STEP: tl.constexpr, below: tl.constexpr, length, HA, HV):
    """`[n, SIZE, SIZE]` of L = diag(beta) A_kk: a block each STEP tokens, `below` the diagonal. 0 past the end."""
    i = tl.arange(0, SIZE)
    first = tl.arange(0, C // STEP) * STEP
    column = (first[:, None] + i[None, :])[:, None, :]
    token = (first + below)[:, None] + i[None, :]
    A = tl.load(A_kk + token[:, :, None] * HA * C + column, mask=(token < length)[:, :, None], other=0.0)
    return A.to(tl.float32) * load_gates(beta, token, length, 0, HV)[:, :, None]


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Of tiles `[n, s, s]`. A batch of one goes as an ordinary product: Triton 3.6 shares out only the batch among the
    warps, so they would all compute the same."""
    s: tl.constexpr = a.shape[1]
    if a.shape[0] == 1:
        return tl.dot(tl.reshape(a, [s, s]), tl.reshape(b, [s, s]), input_precision=PRECISION)[None, :, :]
    return tl.dot(a, b, input_precision=PRECISION)


@kernel
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
