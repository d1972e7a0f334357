"""Which rows a batch takes: a pure function of (seed, step, rank).

Every epoch is a fresh permutation of all rows, drawn from (seed, epoch). Batch number `step` of process `rank` is a
slice of it, so the whole state of the data is one integer, and processes never share a row within an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from lm_zoo.train.curriculum import Curriculum


class RowOrder(Sampler[list[int]]):
    """Batches of row numbers, from `position` on, without end: epoch follows epoch.

    While a curriculum cuts documents, a row stands with the length to cut at, `(number, length)`.

    Rows that do not fill the last batch of an epoch (over all processes) are left out of it; the next epoch's
    permutation takes others.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        curriculum: Curriculum | None = None,
    ) -> None:
        if num_rows < batch_size * world_size:
            raise ValueError(
                f"num_rows={num_rows} is less than one batch: batch_size={batch_size} times world_size={world_size}"
            )
        self.num_rows, self.batch_size, self.seed, self.rank, self.world_size = (
            num_rows, batch_size, seed, rank, world_size,
        )  # fmt: skip
        self.curriculum = curriculum
        self.position = 0
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_rows // (self.batch_size * self.world_size)

    def batch(self, step: int) -> list[int] | list[tuple[int, int]]:
        epoch, step_in_epoch = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.num_rows)
            if self.curriculum is not None and epoch == 0:
                rows_per_batch = self.batch_size * self.world_size
                self._permutation = self.curriculum.arrange(self._permutation, rows_per_batch)
        start = (step_in_epoch * self.world_size + self.rank) * self.batch_size
        rows = self._permutation[start : start + self.batch_size].tolist()
        length = None if self.curriculum is None else self.curriculum.segment_length(step)
        return rows if length is None else [(row, length) for row in rows]

    def __iter__(self) -> Iterator[list]:
        step = self.position
        while True:
            yield self.batch(step)
            step += 1


class RowLoader(DataLoader):
    """Loads `num_batches` batches in the order of a `RowOrder`; its state is the number of batches that were taken.

    What worker processes have prefetched is not counted, so a resumed run continues with the very next batch. The
    length matters: without one, Lightning fetches a batch ahead and a resumed run would skip it.
    """

    def __init__(self, rows: Dataset, order: RowOrder, num_batches: int, **options) -> None:
        super().__init__(rows, batch_sampler=order, **options)
        self.order = order
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            self.order.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.position = state["position"]
