"""A curriculum changes where documents are cut and in which order rows come first, and nothing else."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interrupted_runs import Crash, CrashAt, curve

from lm_zoo.errors import UserError
from lm_zoo.train import Checkpoints
from lm_zoo.train.curriculum import Curriculum, cut
from lm_zoo.train.order import RowOrder
from lm_zoo.train.packing import Rows, Selection, collate_documents


def make_rows(seq_len: int) -> Rows:
    """Of documents of many lengths; token i is i."""
    lengths = np.array([5, 1, 2, 3, 4, 30, 7, 1, 1, 8, 8, 9])
    corpus = SimpleNamespace(tokens=lambda start, length: np.arange(start, start + length))
    starts = np.cumsum(lengths) - lengths
    return Rows(Selection(corpus, starts, lengths, lengths, np.ones(len(lengths), dtype=bool)), seq_len)


def test_lengths_double_up_to_the_row() -> None:
    curriculum = Curriculum(6, batches_per_step=2, seq_len=100, first_seq_len=16)
    lengths = [curriculum.segment_length(batch) for batch in range(16)]
    assert lengths == [16] * 4 + [32] * 4 + [64] * 4 + [None] * 4
    assert Curriculum(6, 1, 100).segment_length(0) is None


def test_documents_are_cut_and_no_token_is_lost() -> None:
    assert cut([0, 5, 6], 20, 4) == [0, 4, 5, 6, 10, 14, 18]
    rows = make_rows(16)
    for i in range(len(rows)):
        tokens, borders = rows[i]
        shorter, more = rows[i, 4]
        assert np.array_equal(shorter, tokens)
        assert set(borders) <= set(more)
        assert max(b - a for a, b in itertools.pairwise([*more, 16])) <= 4
    batch = collate_documents([rows[0, 4], rows[1, 4]])
    assert batch["num_targets"] == (batch["labels"] != -100).sum() == 32 - (len(batch["cu_seqlens"]) - 1)


def test_rows_of_short_documents_come_first() -> None:
    rows = make_rows(8)
    longest = rows.longest(np.arange(len(rows)))
    expected = [max(b - a for a, b in itertools.pairwise([*borders, 8])) for _, borders in (rows[i] for i in range(9))]
    assert longest.tolist() == expected
    assert len(set(expected)) > 2
    plain = RowOrder(9, 1, world_size=2, rank=1)
    order, other = (
        RowOrder(9, 1, world_size=2, rank=rank, curriculum=Curriculum(3, 1, 8, longest=rows.longest)) for rank in (0, 1)
    )
    first = [row for step in range(3) for row in (*order.batch(step), *other.batch(step))]
    assert longest[first].tolist() == sorted(longest[first])
    before = [
        row for step in range(3) for rank in (0, 1) for row in RowOrder(9, 1, world_size=2, rank=rank).batch(step)
    ]
    assert sorted(first) == sorted(before)  # the same rows
    assert first != before
    assert [other.batch(step) for step in range(3, 12)] == [plain.batch(step) for step in range(3, 12)]


def test_a_run_with_a_curriculum_resumes_exactly(start_run, tmp_path) -> None:
    data = {"curriculum_steps": 4, "first_seq_len": 4, "short_documents_first": True, "separator": "\n"}
    options = {"max_steps": 6, "accumulate_grad_batches": 2}
    _, whole = start_run("whole", data=data, **options)
    with pytest.raises(Crash):
        start_run("parts", data=data, checkpoints=Checkpoints(every_n_steps=2), callbacks=[CrashAt(6)], **options)
    _, resumed = start_run("parts", data=data, resume="last", **options)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)
    with pytest.raises(UserError, match=r"data\.curriculum_steps = 4, now it is 5"):
        start_run("parts", data={**data, "curriculum_steps": 5}, resume="last", **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"curriculum_steps": 3}, "goes with data.first_seq_len or data.short_documents_first"),
        ({"first_seq_len": 4}, "goes with data.first_seq_len or data.short_documents_first"),
        ({"curriculum_steps": 3, "first_seq_len": 16}, "first_seq_len=16 must be less than data.seq_len=16"),
        ({"curriculum_steps": 3, "first_seq_len": 4, "respect_documents": False}, "which data.respect_documents=false"),
    ],
)
def test_an_impossible_curriculum_is_refused(start_run, data, message) -> None:
    with pytest.raises(UserError, match=message):
        start_run("run", max_steps=2, data=data)
