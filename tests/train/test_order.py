"""The order of rows is a pure function of (seed, step, rank), and a loader resumes with the very next batch."""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from lm_zoo.train.order import RowLoader, RowOrder


class Numbers(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


def batches(order: RowOrder, count: int) -> list[list[int]]:
    return list(itertools.islice(order, count))


def test_a_batch_depends_on_seed_step_and_rank_only() -> None:
    expected = batches(RowOrder(103, 4, seed=3), 80)
    torch.manual_seed(1)
    order = RowOrder(103, 4, seed=3)
    assert [order.batch(step) for step in reversed(range(80))] == expected[::-1]
    order.position = 33
    assert batches(order, 5) == expected[33:38]
    assert batches(RowOrder(103, 4, seed=4), 80) != expected


def test_an_epoch_takes_every_row_once_and_the_next_another_order() -> None:
    order = RowOrder(103, 4)
    assert order.batches_per_epoch == 25
    epochs = [list(itertools.chain(*(order.batch(25 * epoch + i) for i in range(25)))) for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 100
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_processes_share_no_row_and_make_up_the_batches_of_one() -> None:
    ranks = [RowOrder(103, 2, seed=7, rank=rank, world_size=3) for rank in range(3)]
    alone = RowOrder(103, 6, seed=7)
    for step in range(2 * alone.batches_per_epoch):
        assert list(itertools.chain(*(order.batch(step) for order in ranks))) == alone.batch(step)


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows=7 is less than one batch: batch_size=4 times world_size=2"):
        RowOrder(7, 4, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_with_the_next_batch(workers) -> None:
    def loader() -> RowLoader:
        return RowLoader(Numbers(), RowOrder(20, 2), 1000, num_workers=workers, collate_fn=list)

    expected = batches(RowOrder(20, 2), 40)
    first = loader()
    assert len(first) == 1000
    taken = iter(first)
    assert [next(taken) for _ in range(13)] == expected[:13]  # with workers, more batches are under way
    state = first.state_dict()
    assert state == {"position": 13}
    second = loader()
    second.load_state_dict(state)
    assert list(itertools.islice(second, 9)) == expected[13:22]
