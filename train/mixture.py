"""Several texts mixed by weight: which text a row comes from, and which row of it, as a function of (seed, step, rank).

The rows of all batches are one sequence of slots, in blocks of BLOCK. In each block text j has `quota[j]` slots, in an
order drawn from (seed, block). So before block b, text j has had b * quota[j] rows, and nothing has to be counted to
know its next one. A text's own rows come in permutations of them all, one for each pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from lm_zoo.errors import UserError
from lm_zoo.train.order import RowOrder
from lm_zoo.train.packing import Rows, Selection

BLOCK = 4096


class MixedRows(Dataset):
    """The rows of several texts, numbered through."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.lengths = [len(part) for part in parts]
        self.selection = MixedSelection([part.selection for part in parts])
        self._starts = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part][index - int(self._starts[part])]


class MixedSelection:
    """What is asked of a `Selection`, of several together."""

    def __init__(self, parts: Sequence[Selection]) -> None:
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.tokens_per_byte = self.num_tokens / max(1, sum(int(part.num_bytes.sum()) for part in parts))
        self.corpus = range(sum(len(part.corpus) for part in parts))  # for its length


class MixedOrder(RowOrder):
    """Batches of row numbers of a `MixedRows` with these `lengths`, without end. By default texts count by length."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, weights: Sequence[float] | None = None, **options: int
    ) -> None:
        super().__init__(sum(lengths), batch_size, **options)
        if 0 in lengths:
            raise UserError(
                f"data.prepared: text {list(lengths).index(0) + 1} of {len(lengths)} has less than one row of "
                "data.seq_len; leave it out, or lower data.seq_len"
            )
        self.lengths, self.quota = lengths, quotas(weights or lengths)
        self._starts = np.cumsum([0, *lengths])
        self._block, self._texts, self._counts = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._pass = [-1] * len(lengths)
        self._rows = [np.empty(0, dtype=np.int64)] * len(lengths)

    def batch(self, step: int) -> list[int]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return [self._row(slot) for slot in range(first, first + self.batch_size)]

    def _row(self, slot: int) -> int:
        block, place = divmod(slot, BLOCK)
        if block != self._block:
            self._block = block
            self._texts = self._draw(0, block).permutation(np.repeat(np.arange(len(self.quota)), self.quota))
            self._counts = np.empty(BLOCK, dtype=np.int64)  # how many slots of this block its text has had before
            for text, quota in enumerate(self.quota):
                self._counts[self._texts == text] = np.arange(quota)
        text = int(self._texts[place])
        number, row = divmod(block * self.quota[text] + int(self._counts[place]), self.lengths[text])
        if number != self._pass[text]:
            self._pass[text], self._rows[text] = number, self._draw(1, text, number).permutation(self.lengths[text])
        return int(self._starts[text] + self._rows[text][row])

    def _draw(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *what]))


def quotas(weights: Sequence[float]) -> list[int]:
    """Slots of a block for each text, in proportion to the weights but at least one; BLOCK in all."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    quota = np.maximum(np.floor(shares).astype(np.int64), 1)
    while quota.sum() != BLOCK:  # a few times at most: each text is off by less than one
        step = 1 if quota.sum() < BLOCK else -1
        quota[np.argmax(np.where((quota > 1) | (step > 0), step * (shares - quota), -np.inf))] += step
    return quota.tolist()
