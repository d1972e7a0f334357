"""Where a rank's segment lies in its sequence, or among the documents that are packed along time."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.kernels.sequence_parallel.exchange import total
from lm_zoo.kernels.sequence_parallel.group import SequenceGroup


class Segment:
    """T tokens of n T, and where `cu_seqlens` `[N + 1]`, from 0 to n T, cuts them.

    Without `cu_seqlens` each of the B rows of a batch is a document that all segments are part of. An empty document
    counts as the first rank's.

    Attributes:
        offset: tokens before this segment.
        cu_seqlens: the borders within the segment, from 0 to T; documents without a token here are empty.
        first: `[T]`, tokens that a document starts with.
        last: `[1]`, the document of the last token here, whose state the next segment takes on.
        opens, closes: `[N]`, documents whose first, and whose last token is here.
        continues: `[N]`, the document that goes on from the segment before, where there is one.
    """

    def __init__(self, group: SequenceGroup, length: int, cu_seqlens: Tensor | None, device: torch.device):
        group.check_length(length, device)
        self.group, self.length, self.offset = group, length, group.rank * length
        self.cu_seqlens = cu_seqlens
        if cu_seqlens is None:
            return
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_bounds(cu_seqlens.tolist(), group.size * length)
        after = self.offset + length
        start, end = cu_seqlens[:-1], cu_seqlens[1:]
        filled = end > start
        kept = ~filled & (group.rank == 0)
        self.opens = filled & (start >= self.offset) & (start < after) | kept
        self.closes = filled & (end > self.offset) & (end <= after) | kept
        self.continues = filled & (start < self.offset) & (end > self.offset)
        self.cu_seqlens = (cu_seqlens - self.offset).clamp(0, length)
        slots = torch.where(self.opens & filled, start - self.offset, length)
        self.first = torch.zeros(length + 1, dtype=torch.bool, device=device).index_fill(0, slots.long(), True)[:-1]
        self.last = torch.searchsorted(cu_seqlens, cu_seqlens.new_full((1,), after - 1), right=True) - 1
        self.start = start

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def rows(self, batch: int) -> int:
        return self.cu_seqlens.numel() - 1 if self.packed else batch

    def own(self, states: Tensor, empty: float = 0.0) -> Tensor:
        """Of the documents' initial states those of the ones that start here, `empty` for the others.

        Those of a batch's rows reach the first segment by way of `Carry`, as all others' states reach theirs.
        """
        if not self.packed:
            return torch.full_like(states, empty)
        return torch.where(_as_rows(self.opens, states), states, empty)

    def start_of(self, states: Tensor | None) -> Tensor | None:
        """What `Carry` starts with."""
        return None if self.packed else states

    def entering(self, S_in: Tensor, others: Tensor) -> Tensor:
        """The state that each document starts with here: S_in where it goes on, `others` (of `own`) where it does not.

        With the 1 of a transition as S_in, what `Carry` needs to know of one.
        """
        if not self.packed:
            return S_in.expand_as(others)
        return torch.where(_as_rows(self.continues, others), S_in, others)

    def leaving(self, states: Tensor) -> Tensor:
        """The states that the next segment takes on, of those of all documents."""
        return states.index_select(0, self.last) if self.packed else states

    def whole(self) -> Tensor | None:
        """`[1]`, whether one document goes on through the whole segment; `None` is yes."""
        return ~self.first.any(dim=0, keepdim=True) if self.packed else None

    def final(self, states: Tensor) -> Tensor:
        """The documents' final states, the same on all ranks, of what they are after this segment."""
        if self.packed:
            closes = self.closes
        else:
            closes = torch.full((1,), self.group.rank == self.group.size - 1, device=states.device)
        return total(torch.where(_as_rows(closes, states), states, 0), self.group)

    def distance(self, count: int) -> Tensor:
        """How far the last `count` tokens before this segment are into the document of its first, `[B or 1, count]`.

        Below 0 for those before it: -1 is the one just before.
        """
        device = self.cu_seqlens.device if self.packed else None
        tokens = torch.arange(self.offset - count, self.offset, device=device)
        if self.packed:
            tokens = tokens - (self.continues * self.start).sum()
        return tokens


def _as_rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))
