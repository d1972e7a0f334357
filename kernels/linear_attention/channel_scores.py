"""Scores under a decay per key channel, sum_d x_id k_jd e^{G_id - G_jd} for i > j, as products of factored tiles.

The exponent must be split between x and k for a matrix product, and e^{-G} alone overflows. So the triangle is cut
into tiles, each with a reference row r of its own, (x_i e^{G_i - G_r}) (k_j e^{G_r - G_j})^T:

- a square below the diagonal takes its first row as reference: G_i - G_r <= 0 and G_r - G_j <= 0;
- a block on the diagonal takes its middle row, which is exact as long as the decay across the block stays within
  SAFE_SPAN nats; the blocks are halved until it does (a block of one row holds nothing below the diagonal).

Usual gates span a few nats per chunk, so the usual cost is one product; the strongest cost six small ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Factors up to e^30 and no less than e^-30: far from the range of float32, and a difference of G below 30 is rounded
# by at most 1e-6, which is what bounds the relative error of a score.
SAFE_SPAN = 60.0


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """`[..., C, C]` to a view `[..., C / size, size, size]` of the blocks on its diagonal."""
    count = matrix.shape[-1] // size
    blocks = matrix.unflatten(-2, (count, size)).unflatten(-1, (count, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@dataclass
class Tiles:
    """All tiles of one size: how to cut rows, columns and scores (as views), and the factors of both sides."""

    size: int
    on_diagonal: bool
    row_decay: Tensor  # e^{G_i - G_r}
    column_decay: Tensor  # e^{G_r - G_j}

    def rows(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(2, (-1, self.size))
        return blocks if self.on_diagonal else blocks[:, :, 1::2]

    def columns(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(2, (-1, self.size))
        return blocks if self.on_diagonal else blocks[:, :, 0::2]

    def scores(self, matrix: Tensor) -> Tensor:
        if self.on_diagonal:
            return diagonal_blocks(matrix, self.size)
        return diagonal_blocks(matrix, 2 * self.size)[..., self.size :, : self.size]


def exp_of(difference: Tensor, dtype: torch.dtype) -> Tensor:
    """e^difference in `dtype`, of a difference of cumulative decays that was taken in float64; always a new tensor."""
    return difference.to(dtype).exp_() if difference.dtype != dtype else difference.exp()


def tiles(G: Tensor, dtype: torch.dtype) -> Iterator[Tiles]:
    """The tiles that cover the strict lower triangle of chunks with cumulative log decay G `[M, H, C, K]`."""
    length = size = G.shape[2]
    blocks = G.unflatten(2, (-1, size))
    while size > 1 and (blocks[..., 0, :] - blocks[..., -1, :]).max() > SAFE_SPAN:
        size //= 2
        blocks = G.unflatten(2, (-1, size))
    if size > 1:
        exponent = blocks - blocks[..., size // 2, None, :]
        yield Tiles(size, True, exp_of(exponent, dtype), exp_of(-exponent, dtype))
    while size < length:
        early, late = blocks[:, :, 0::2], blocks[:, :, 1::2]
        reference = late[..., :1, :]
        yield Tiles(size, False, exp_of(late - reference, dtype), exp_of(reference - early, dtype))
        size *= 2
        blocks = G.unflatten(2, (-1, size))


def channel_scores(rows: list[Tensor], k: Tensor, G: Tensor) -> list[Tensor]:
    """For each x `[M, H, C, K]` of `rows`, its scores with k, `[M, H, C, C]`, zero on and above the diagonal."""
    scores = [k.new_zeros(*k.shape[:3], k.shape[2]) for _ in rows]
    for tile in tiles(G, k.dtype):
        columns = (tile.columns(k) * tile.column_decay).mT
        for x, out in zip(rows, scores, strict=True):
            tile.scores(out).copy_((tile.rows(x) * tile.row_decay) @ columns)
    return [out.tril_(-1) for out in scores]


def channel_scores_backward(
    dscores: list[Tensor], rows: list[Tensor], k: Tensor, G: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of `channel_scores`: one per x of `rows`, and that of k as columns. `dscores` is strictly lower."""
    drows = [k.new_zeros(k.shape) for _ in rows]
    dk = k.new_zeros(k.shape)
    for tile in tiles(G, k.dtype):
        columns = tile.columns(k) * tile.column_decay
        for x, dx, dscore in zip(rows, drows, dscores, strict=True):
            dtile = tile.scores(dscore)
            tile.rows(dx).addcmul_(dtile @ columns, tile.row_decay)
            tile.columns(dk).addcmul_(dtile.mT @ (tile.rows(x) * tile.row_decay), tile.column_decay)
    return drows, dk
