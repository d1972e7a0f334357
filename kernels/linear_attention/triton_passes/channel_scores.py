"""Pass 2, chunk_scores, under a decay per key channel: sum_d x_id k_jd e^{G_id - G_jd} for i >= j, and its gradients.

A product of tiles needs the exponent split between i and j, and e^{-G} overflows. So the pairs i > j of a chunk are
told apart by the highest bit in which i and j differ, its `level`. The pairs of a level fill squares below the
diagonal, of 2^level rows; the first row r of a square, i with the lower bits cleared, lies between both tokens:

    level 5     level 4     levels 3 .. 0
    . .         . . . .     and so on, down to squares of a single pair
    X .         X . . .
                . . . .
                . . X .

    e^{G_i - G_j} = e^{G_i - G_r} e^{G_r - G_j},    both exponents <= 0

One product of 64x64 per level covers all its squares; what it computes elsewhere is finite, and masked. As a token
needs only one of its two factors at a level, E = e^{-|G - G_r|} is both. This is exact for any decay, takes 6
exponentials per gate where pairs would take 32, and leaves nothing to do pair by pair but the diagonal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, chunk_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import blocks, dot, load_tokens, store_tokens
from lm_zoo.kernels.triton_kernel import kernel

LEVELS: tl.constexpr = tl.constexpr(C.value.bit_length() - 1)

# Launch.block: channels that stand in a tile.
for device_class in ("large", "small"):
    TABLE["channel_scores_kernel", device_class] = {size: Launch(64, 8, 1) for size in (64, 128, 256)}
    for key in ("channel_scores_backward_kernel", "channel_scores_backward_kernel, additive"):
        TABLE[key, device_class] = {size: Launch(32, 8, 1) for size in (64, 128, 256)}
TABLE["channel_scores_backward_kernel, additive", "hopper"] = {size: Launch(32, 4, 1) for size in (64, 128, 256)}


def channel_scores(
    q: Tensor, k: Tensor, G: Tensor, scale: float, segment: Segment, *, delta: bool
) -> tuple[Tensor, Tensor | None]:
    """A_qk in q's dtype, and A_kk if `delta`, in float32: keys have much in common, and the inverse that is taken of
    A_kk (`delta_transform`) makes much of the rounding of each score on its own."""
    (H, K), HV = k.shape[2:], G.shape[2]
    A_qk = q.new_empty(*G.shape[:3], C.value)
    A_kk = torch.empty_like(A_qk, dtype=torch.float32) if delta else None
    block, warps, stages = launch("channel_scores_kernel", q, K)
    channel_scores_kernel[segment.chunks, HV](
        q, k, G, A_qk, A_kk, segment.bounds, segment.length, scale, H, HV,
        K=K, BLOCK_K=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return A_qk, A_kk


def channel_scores_backward(
    dA_qk: Tensor,
    dA_kk: Tensor | None,
    q: Tensor,
    k: Tensor,
    G: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dG: Tensor | None,
    segment: Segment,
) -> None:
    """Adds to dq, dk and, if there is one, dG, float32 and one per value head. Of dA_qk what is above the diagonal is
    not looked at, of dA_kk what is on it neither."""
    (H, K), HV = k.shape[2:], G.shape[2]
    block, warps, stages = launch("channel_scores_backward_kernel" + ", additive" * (dA_kk is None), q, K)
    channel_scores_backward_kernel[segment.chunks, HV, blocks(K, block)](
        dA_qk, dA_kk, q, k, G, dq, dk, dG, segment.bounds, segment.length, scale, H, HV,
        K=K, BLOCK_K=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def reference(i, level):
    """The first row of the square that token i is in at a level, be it one of its rows or of its columns."""
    return ((i >> level) | 1) << level


@triton.jit
def factor(g, G_r):
    """E = e^{-|G - G_r|}. `tl.exp` spends three instructions more on what is below 1e-38, and may be 0 here."""
    return tl.exp2(tl.abs(g - G_r) * -1.4426950408889634)


@triton.jit
def pairs_of(level):
    """Which pairs i > j are of a level, `[C, C]`: j in a block of 2^level tokens with an even number, i in the next.

    One comparison per pair; what does not depend on the level would stay in registers over the loop."""
    block = tl.arange(0, C) >> level
    next_block = tl.where(block % 2 == 0, block + 1, -1)
    return block[:, None] == next_block[None, :]


@kernel
def channel_scores_kernel(
    q, k, G, A_qk, A_kk, bounds, T, scale, H, HV, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A_qk[i,j] = scale sum_d q_id k_jd e^{G_id - G_jd} for i >= j, A_kk[i,j] likewise of k for i > j.

    One chunk and one value head per program. G_r is loaded at the end of the level before and carried over: loaded
    within its own level, the compiler would load and compute E once for every operand it goes into.
    """
    start, end = chunk_tokens(tl.cast(tl.program_id(0), tl.int64), bounds, T)
    length = tl.cast(end - start, tl.int32)
    head = tl.program_id(1)
    shared_head = head // (HV // H)
    q, k, G = q + start * H * K, k + start * H * K, G + start * HV * K
    i = tl.arange(0, C)
    scores_qk = tl.zeros([C, C], dtype=tl.float32)
    scores_kk = tl.zeros([C, C], dtype=tl.float32)
    diagonal = tl.zeros([C], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        queries = load_tokens(q, i, length, shared_head, H, channel, K)
        keys = load_tokens(k, i, length, shared_head, H, channel, K)
        g = load_tokens(G, i, length, head, HV, channel, K)
        diagonal += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), axis=1)
        G_r = load_tokens(G, reference(i, 0), length, head, HV, channel, K)
        for level in range(LEVELS):
            E = factor(g, G_r)
            pairs = pairs_of(level)
            rows = (queries * E).to(queries.dtype)
            columns = (keys * E).to(keys.dtype)
            columns_T = tl.trans(columns)
            scores_qk = tl.where(pairs, dot(rows, columns_T, scores_qk), scores_qk)
            if A_kk is not None:
                scores_kk = tl.where(pairs, dot(columns, columns_T, scores_kk), scores_kk)
            G_r = load_tokens(G, reference(i, level + 1), length, head, HV, channel, K)
    scores_qk = tl.where(i[:, None] == i[None, :], diagonal[:, None], scores_qk) * scale
    store_tokens(A_qk + start * HV * C, scores_qk, i, length, head, HV, i, C)
    if A_kk is not None:
        store_tokens(A_kk + start * HV * C, scores_kk, i, length, head, HV, i, C)


@kernel
def channel_scores_backward_kernel(
    dA_qk, dA_kk, q, k, G, dq, dk, dG, bounds, T, scale, H, HV, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """With P the gradient of the scores in the squares of a level, x' = x E, and sums over the levels,

        dq += sum E (P_qk k')                     dk += sum E (P_qk^T q' + (P_kk + P_kk^T) k')
        dG += sum q' (P_qk k') - k' (P_qk^T q') + k' ((P_kk - P_kk^T) k')

    One chunk, one value head and one block of channels per program.

    dG takes x' as rounded for the products: what a pair adds at i and takes at j is then one number, which cancels in
    all decays on the same side of both. With x E unrounded, the error of every pair of the chunk would reach every
    decay. The diagonal does not depend on G and is kept out of dG.
    """
    start, end = chunk_tokens(tl.cast(tl.program_id(0), tl.int64), bounds, T)
    length = tl.cast(end - start, tl.int32)
    head = tl.program_id(1)
    shared_head = head // (HV // H)
    q, k, G = q + start * H * K, k + start * H * K, G + start * HV * K
    dq, dk = dq + start * HV * K, dk + start * HV * K
    i = tl.arange(0, C)
    channel = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    queries = load_tokens(q, i, length, shared_head, H, channel, K)
    keys = load_tokens(k, i, length, shared_head, H, channel, K)
    g = load_tokens(G, i, length, head, HV, channel, K)
    dscores_qk = load_tokens(dA_qk + start * HV * C, i, length, head, HV, i, C) * scale
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], dscores_qk, 0.0), axis=1)[:, None]
    dscores_qk = dscores_qk.to(queries.dtype)
    if dA_kk is not None:
        dscores_kk = load_tokens(dA_kk + start * HV * C, i, length, head, HV, i, C).to(keys.dtype)

    dq_tile = load_tokens(dq, i, length, head, HV, channel, K) + diagonal * keys
    dk_tile = load_tokens(dk, i, length, head, HV, channel, K) + diagonal * queries
    dG_tile = tl.zeros([C, BLOCK_K], dtype=tl.float32)
    if dG is not None:
        dG += start * HV * K
        dG_tile += load_tokens(dG, i, length, head, HV, channel, K)
    G_r = load_tokens(G, reference(i, 0), length, head, HV, channel, K)
    for level in range(LEVELS):
        E = factor(g, G_r)
        pairs = pairs_of(level)
        rows = (queries * E).to(queries.dtype)
        columns = (keys * E).to(keys.dtype)
        P = tl.where(pairs, dscores_qk, 0.0)
        early = dot(tl.trans(P), rows)
        late = dot(P, columns)
        dq_tile += E * late
        dG_tile += rows * late
        if dA_kk is not None:
            P = tl.where(pairs, dscores_kk, 0.0)
            early = dot(tl.trans(P), columns, early)
            late = dot(P, columns)
            dk_tile += E * (early + late)
            dG_tile += columns * (late - early)
        else:
            dk_tile += E * early
            dG_tile -= columns * early
        G_r = load_tokens(G, reference(i, level + 1), length, head, HV, channel, K)
    store_tokens(dq, dq_tile, i, length, head, HV, channel, K)
    store_tokens(dk, dk_tile, i, length, head, HV, channel, K)
    if dG is not None:
        store_tokens(dG, dG_tile, i, length, head, HV, channel, K)
