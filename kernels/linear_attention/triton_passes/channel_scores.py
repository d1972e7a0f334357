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

LEVELS: tl.constexpr = tl.constexpr(C.value.bit_length() - 1)

# Launch.block: channels that stand in a tile.
for device_class in ("large", "small"):
    TABLE["channel_scores", device_class] = {size: Launch(64, 8, 1) for size in (64, 128, 256)}
    TABLE["channel_scores_backward", device_class] = {size: Launch(32, 8, 1) for size in (64, 128, 256)}


def channel_scores(
    q: Tensor, k: Tensor, G: Tensor, scale: float, segment: Segment, *, delta: bool
) -> tuple[Tensor, Tensor | None]:
    """A_qk in q's dtype, and A_kk if `delta`, in float32: keys have much in common, and the inverse that is taken of
    A_kk (`delta_transform`) makes much of the rounding of each score on its own."""
    K, heads = k.shape[3], G.shape[2]
    A_qk = q.new_empty(*G.shape[:3], C.value)
    A_kk = torch.empty_like(A_qk, dtype=torch.float32) if delta else None
    block, warps, stages = launch("channel_scores", q, K)
    channel_scores_kernel[segment.chunks, heads](
        q, k, G, A_qk, A_kk, segment.bounds, segment.length, scale, k.shape[2], heads,
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
    dG: Tensor,
    segment: Segment,
) -> None:
    """Adds to dq, dk and dG, float32 and one per value head. Of dA_qk what is above the diagonal is not looked at, of
    dA_kk what is on it neither."""
    K, heads = k.shape[3], G.shape[2]
    block, warps, stages = launch("channel_scores_backward", q, K)
    channel_scores_backward_kernel[segment.chunks, heads, triton.cdiv(K, block)](
        dA_qk, dA_kk, q, k, G, dq, dk, dG, segment.bounds, segment.length, scale, k.shape[2], heads,
        K=K, BLOCK_K=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def channel_tile(length, heads, first, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets of channels `first` to `first + BLOCK_K` of the tokens of a chunk in `[B T, heads, K]`, from the first
    channel of its first token, and which of them exist."""
    row, channel = tl.arange(0, C), first + tl.arange(0, BLOCK_K)
    return row[:, None] * (heads * K) + channel[None, :], (row < length)[:, None] & (channel < K)[None, :]


@triton.jit
def score_tile(length, heads):
    """The same of scores `[B T, heads, C]`."""
    row = tl.arange(0, C)
    return row[:, None] * (heads * C) + row[None, :], (row < length)[:, None] & (row >= 0)[None, :]


@triton.jit
def load_references(G, length, heads, first, level, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """G_r of each token's square of a level, `[C, BLOCK_K]`. Squares that begin past the end hold no tokens."""
    row, channel = ((tl.arange(0, C) >> level) | 1) << level, first + tl.arange(0, BLOCK_K)
    exists = (row < length)[:, None] & (channel < K)[None, :]
    return tl.load(G + row[:, None] * (heads * K) + channel[None, :], mask=exists, other=0.0)


@triton.jit
def pairs_of(level):
    """Which pairs i > j are of a level, `[C, C]`."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (((i ^ j) >> level) == 1) & (i > j)


@triton.jit
def channel_scores_kernel(
    q, k, G, A_qk, A_kk, bounds, T, scale, H, HV, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A_qk[i,j] = scale sum_d q_id k_jd e^{G_id - G_jd} for i >= j, A_kk[i,j] likewise of k for i > j.

    One chunk and value head per program."""
    start, end = chunk_tokens(tl.cast(tl.program_id(0), tl.int64), bounds, T)
    length = tl.cast(end - start, tl.int32)
    head = tl.program_id(1)
    shared, own = start * H + head // (HV // H), start * HV + head
    scores_qk = tl.zeros([C, C], tl.float32)
    scores_kk = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for first in range(0, K, BLOCK_K):
        at, exists = channel_tile(length, H, first, K, BLOCK_K)
        q_tile = tl.load(q + shared * K + at, mask=exists, other=0.0)
        k_tile = tl.load(k + shared * K + at, mask=exists, other=0.0)
        at, exists = channel_tile(length, HV, first, K, BLOCK_K)
        gates = tl.load(G + own * K + at, mask=exists, other=0.0)
        diagonal += tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)
        references = load_references(G + own * K, length, HV, first, 0, K, BLOCK_K)
        for level in range(LEVELS):
            E = tl.exp(-tl.abs(gates - references))
            references = load_references(G + own * K, length, HV, first, level + 1, K, BLOCK_K)  # meanwhile
            pairs = pairs_of(level)
            rows = (q_tile * E).to(q_tile.dtype)
            columns = (k_tile * E).to(k_tile.dtype)
            scores_qk += tl.where(pairs, tl.dot(rows, tl.trans(columns), input_precision="ieee"), 0.0)
            if A_kk is not None:
                scores_kk += tl.where(pairs, tl.dot(columns, tl.trans(columns), input_precision="ieee"), 0.0)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    at, exists = score_tile(length, HV)
    scores_qk = tl.where(i == j, diagonal[:, None], scores_qk) * scale
    tl.store(A_qk + own * C + at, scores_qk.to(A_qk.dtype.element_ty), mask=exists)
    if A_kk is not None:
        tl.store(A_kk + own * C + at, scores_kk, mask=exists)


@triton.jit
def channel_scores_backward_kernel(
    dA_qk, dA_kk, q, k, G, dq, dk, dG, bounds, T, scale, H, HV, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """With P the gradient of the scores in the squares of a level, x' = x E, and sums over the levels,

        dq += sum E (P_qk k')                     dk += sum E (P_qk^T q' + (P_kk + P_kk^T) k')
        dG += sum q' (P_qk k') - k' (P_qk^T q') + k' ((P_kk - P_kk^T) k')

    One chunk, value head and block of channels per program.

    dG takes x' as rounded for the products: what a pair adds at i and takes at j is then one number, which cancels in
    all decays on the same side of both. With x E unrounded, the error of every pair of the chunk would reach every
    decay. The diagonal does not depend on G and is kept out of dG.
    """
    start, end = chunk_tokens(tl.cast(tl.program_id(0), tl.int64), bounds, T)
    length = tl.cast(end - start, tl.int32)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_K
    shared, own = start * H + head // (HV // H), start * HV + head
    at, exists = channel_tile(length, H, first, K, BLOCK_K)
    q_tile = tl.load(q + shared * K + at, mask=exists, other=0.0)
    k_tile = tl.load(k + shared * K + at, mask=exists, other=0.0)
    at, exists = channel_tile(length, HV, first, K, BLOCK_K)
    gates = tl.load(G + own * K + at, mask=exists, other=0.0)
    at_scores, scores_exist = score_tile(length, HV)
    dscores_qk = tl.load(dA_qk + own * C + at_scores, mask=scores_exist, other=0.0) * scale
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    diagonal = tl.sum(tl.where(i == j, dscores_qk, 0.0), 1)[:, None]
    dscores_qk = dscores_qk.to(q_tile.dtype)
    if dA_kk is not None:
        dscores_kk = tl.load(dA_kk + own * C + at_scores, mask=scores_exist, other=0.0).to(k_tile.dtype)
    dq_tile = diagonal * k_tile
    dk_tile = diagonal * q_tile
    dG_tile = tl.zeros([C, BLOCK_K], tl.float32)
    references = load_references(G + own * K, length, HV, first, 0, K, BLOCK_K)
    for level in range(LEVELS):
        E = tl.exp(-tl.abs(gates - references))
        references = load_references(G + own * K, length, HV, first, level + 1, K, BLOCK_K)  # meanwhile
        pairs = pairs_of(level)
        rows = (q_tile * E).to(q_tile.dtype)
        columns = (k_tile * E).to(k_tile.dtype)
        P = tl.where(pairs, dscores_qk, 0.0)
        late = tl.dot(P, columns, input_precision="ieee")
        dq_tile += E * late
        dG_tile += rows * late
        early = tl.dot(tl.trans(P), rows, input_precision="ieee")
        if dA_kk is not None:
            P = tl.where(pairs, dscores_kk, 0.0)
            early = tl.dot(tl.trans(P), columns, early, input_precision="ieee")
            late = tl.dot(P, columns, input_precision="ieee")
            dk_tile += E * late
            dG_tile += columns * late
        dk_tile += E * early
        dG_tile -= columns * early
    tl.store(dq + own * K + at, tl.load(dq + own * K + at, mask=exists) + dq_tile, mask=exists)
    tl.store(dk + own * K + at, tl.load(dk + own * K + at, mask=exists) + dk_tile, mask=exists)
    tl.store(dG + own * K + at, tl.load(dG + own * K + at, mask=exists) + dG_tile, mask=exists)
