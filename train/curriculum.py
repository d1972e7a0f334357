"""What a run reads first: short segments, short documents, or both, over its first optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curriculum:
    """Of the first `steps` optimizer steps; a pure function of the step, so a resumed run goes on with it.

    Attributes:
        steps: how long it lasts.
        batches_per_step: micro-batches per optimizer step, in one process.
        seq_len: tokens per row.
        first_seq_len: documents are cut after so many tokens at first, and that doubles in equal stages up to the whole
            row. Every batch has the same number of tokens. `None` leaves them whole.
        longest: the tokens of the longest document part in each of these rows. The rows of all these steps come in this
            order, short ones first; they are the rows that would have come anyway. `None` leaves the order.
    """

    steps: int
    batches_per_step: int
    seq_len: int
    first_seq_len: int | None = None
    longest: Callable[[np.ndarray], np.ndarray] | None = None

    def segment_length(self, batch: int) -> int | None:
        """At how many tokens documents are cut in micro-batch `batch`; `None` if they are whole."""
        step = batch // self.batches_per_step
        if self.first_seq_len is None or step >= self.steps:
            return None
        stages = math.ceil(math.log2(self.seq_len / self.first_seq_len))
        return self.first_seq_len * 2 ** (step * stages // self.steps)

    def arrange(self, rows: np.ndarray, rows_per_batch: int) -> np.ndarray:
        """The order of the first epoch's rows, `rows_per_batch` of which are a micro-batch over all processes."""
        if self.longest is None:
            return rows
        count = min(len(rows), self.steps * self.batches_per_step * rows_per_batch)
        first = rows[:count]
        return np.concatenate([first[np.argsort(self.longest(first), kind="stable")], rows[count:]])


def cut(borders: list[int], end: int, length: int) -> list[int]:
    """The segments that start at `borders`, the last one up to `end`, in parts of at most `length` tokens."""
    ends = [*borders[1:], end]
    return [start for first, last in zip(borders, ends, strict=True) for start in range(first, last, length)]
