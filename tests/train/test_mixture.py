"""Texts mixed by weight: shares, passes, and a state that is one number."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lm_zoo.errors import UserError
from lm_zoo.train import Checkpoints, Interrupted
from lm_zoo.train.mixture import BLOCK, MixedOrder, quotas
from lm_zoo.train.prepare import prepare
from lm_zoo.train.sources import TextFiles
from lm_zoo.train.tokenizers import byte_tokenizer


def rows(order: MixedOrder, steps) -> list[int]:
    return list(itertools.chain(*(order.batch(step) for step in steps)))


def test_weights_are_kept_in_every_block_and_each_pass_takes_every_row_once() -> None:
    order = MixedOrder([1000, 50, 7], 8, weights=[6, 3, 1], seed=3)
    assert order.quota == [2457, 1229, 410]
    taken = rows(order, range(3 * BLOCK // 8))
    for block in range(3):
        texts = np.searchsorted([1000, 1050], taken[block * BLOCK : (block + 1) * BLOCK], side="right")
        assert np.bincount(texts).tolist() == order.quota
    for first, length in ((0, 1000), (1000, 50), (1050, 7)):
        of_text = [row for row in taken if first <= row < first + length]
        passes = [of_text[i : i + length] for i in range(0, len(of_text) - length + 1, length)]
        assert all(sorted(one) == list(range(first, first + length)) for one in passes)
        assert len(passes) > 1
        assert passes[0] != passes[1]
    assert Counter(taken[:40]) != Counter(rows(MixedOrder([1000, 50, 7], 8, weights=[6, 3, 1], seed=4), range(5)))


def test_a_batch_depends_on_seed_step_and_rank_only() -> None:
    options = {"weights": [1, 2], "seed": 5}
    steps = range(0, 2000, 37)
    expected = [MixedOrder([300, 90], 6, **options).batch(step) for step in steps]
    order = MixedOrder([300, 90], 6, **options)
    assert [order.batch(step) for step in reversed(steps)] == expected[::-1]
    ranks = [MixedOrder([300, 90], 2, rank=rank, world_size=3, **options) for rank in range(3)]
    assert [list(itertools.chain(*(one.batch(step) for one in ranks))) for step in steps] == expected
    order.position = 37
    assert next(iter(order)) == expected[1]


@pytest.mark.parametrize("weights", [[1], [1, 1], [1e-9, 1, 5], [3, 2, 2, 1] * 40, [1e6, 1, 1, 1]])
def test_quotas_fill_a_block(weights) -> None:
    quota = quotas(weights)
    assert sum(quota) == BLOCK
    assert min(quota) >= 1
    shares = np.array(weights) / sum(weights) * BLOCK
    assert np.abs(np.array(quota) - np.maximum(shares, 1)).max() < 4


def test_a_run_on_a_mixture_resumes_as_it_was(tmp_path, start_run, make_text) -> None:
    folders = []
    for i in range(2):
        file = tmp_path / f"{i}.txt"
        file.write_text(make_text(1500, i))
        prepare(TextFiles((file,)), byte_tokenizer(), tmp_path / f"tokens-{i}")
        folders.append(str(tmp_path / f"tokens-{i}"))
    data = {"files": None, "prepared": folders, "weights": [3, 1], "val_fraction": 0.1}
    options = {"max_steps": 6, "limit_val_batches": 2, "val_check_interval": 3}
    _, whole = start_run("whole", data=data, **options)

    class Stop(Checkpoints):
        def on_train_batch_end(self, trainer, *args) -> None:
            self._signum = 15 if trainer.global_step == 4 else None
            super().on_train_batch_end(trainer, *args)

    with pytest.raises(Interrupted):
        start_run("parts", data=data, checkpoints=Stop(), **options)
    _, resumed = start_run("parts", data=data, resume="last", **options)
    assert resumed.model.lm_head.weight.equal(whole.model.lm_head.weight)
    for change, message in [
        ({"weights": [1, 3]}, r"made with data.weights = \[3, 1\], now it is \[1, 3\]"),
        ({"weights": [1, 0]}, "is not possible; give numbers above 0"),
        ({"curriculum_steps": 2, "short_documents_first": True}, "orders one text, not a mixture"),
    ]:
        with pytest.raises(UserError, match=message):
            start_run("parts", data=data | change, resume="last", **options)


def test_a_text_without_a_row_is_named() -> None:
    with pytest.raises(UserError, match=r"text 2 of 2 has less than one row of data.seq_len"):
        MixedOrder([10, 0], 2)
