"""Rows hold every token once, know their documents, and teach nothing across a border."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.train.packing import IGNORE, Rows, Selection, collate_documents, collate_rows, hold_out


class FakeCorpus:
    """Documents of given lengths in one or several pieces each; token i of the corpus is i."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.lengths = np.array(list(itertools.chain(*documents)))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_bytes = self.lengths * 3
        self.starts_document = np.array([i == 0 for pieces in documents for i in range(len(pieces))])
        keys = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, len(documents))
        self.keys = np.concatenate([[key] * len(pieces) for key, pieces in zip(keys, documents, strict=True)])

    def tokens(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length, dtype=np.uint16)


DOCUMENTS = [[5], [1], [2, 3, 4], [30, 7], [1], [1], [8, 8], [9]]


@pytest.mark.parametrize("seq_len", [2, 5, 8, 16, 79])
def test_every_token_once_with_the_borders_of_its_document(seq_len) -> None:
    corpus = FakeCorpus(DOCUMENTS)
    rows = Rows(Selection.all_of(corpus), seq_len)
    first_tokens = set(np.cumsum([0, *(sum(pieces) for pieces in DOCUMENTS)]).tolist())
    assert len(rows) == 79 // seq_len
    seen = []
    for row, borders in (rows[i] for i in range(len(rows))):
        assert row.dtype == np.int64
        assert len(row) == seq_len
        assert borders == [i for i, token in enumerate(row.tolist()) if i == 0 or token in first_tokens]
        seen += row.tolist()
    assert seen == list(range(len(rows) * seq_len))
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_max_tokens_shortens_the_rows() -> None:
    assert len(Rows(Selection.all_of(FakeCorpus(DOCUMENTS)), 8, max_tokens=41)) == 5


def test_the_packed_batch() -> None:
    rows = Rows(Selection.all_of(FakeCorpus(DOCUMENTS)), 8)
    batch = collate_documents([rows[3], rows[0]])
    assert batch["input_ids"].tolist() == [[*range(24, 32), *range(8)]]
    assert batch["cu_seqlens"].tolist() == [0, 8, 13, 14, 16]
    assert batch["cu_seqlens"].dtype == torch.int32
    masked = [0, 8, 13, 14]
    expected = [IGNORE if i in masked else token for i, token in enumerate(batch["input_ids"][0].tolist())]
    assert batch["labels"].tolist() == [expected]
    assert batch["num_targets"] == 16 - len(masked)


def test_plain_rows() -> None:
    rows = Rows(Selection.all_of(FakeCorpus(DOCUMENTS)), 8)
    batch = collate_rows([rows[3], rows[0]])
    assert batch["input_ids"].tolist() == [[*range(24, 32)], [*range(8)]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert "cu_seqlens" not in batch
    assert batch["num_targets"] == 14


@pytest.mark.parametrize("mixer", ["gla", "attention", "retnet"])
def test_the_loss_of_a_packed_batch_is_that_of_its_documents(mixer) -> None:
    torch.manual_seed(0)
    config = ZooConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=2, intermediate_size=32, mixers={mixer: {"num_heads": 2}}
    )
    model = ZooForCausalLM(config).double()
    rows = Rows(Selection.all_of(FakeCorpus(DOCUMENTS)), 8)
    batch = collate_documents([rows[0], rows[2], rows[7]])
    loss = model(batch["input_ids"], labels=batch["labels"], cu_seqlens=batch["cu_seqlens"]).loss
    total, count = 0.0, 0
    for start, end in itertools.pairwise(batch["cu_seqlens"].tolist()):
        segment = batch["input_ids"][:, start:end]
        if end - start > 1:
            total += model(segment, labels=segment).loss.item() * (end - start - 1)
            count += end - start - 1
    assert count == batch["num_targets"]
    assert abs(loss.item() - total / count) < 1e-5


def test_documents_are_held_out_by_their_text_alone() -> None:
    corpus = FakeCorpus([[3, 4]] * 2000)
    training, validation = hold_out(corpus, 0.1)
    assert len(training.lengths) + len(validation.lengths) == 4000
    assert 150 * 2 < len(validation.lengths) < 250 * 2
    assert set(training.starts).isdisjoint(validation.starts)
    assert validation.starts_document.sum() == len(validation.lengths) / 2  # never half a document
    more = FakeCorpus([[3, 4]] * 2000)
    more.keys = corpus.keys[::-1].copy()  # the same documents in another order
    other = hold_out(more, 0.1)[1]
    assert len(other.lengths) == len(validation.lengths)
    assert hold_out(corpus, 0.0)[1].num_tokens == 0


def test_of_a_few_documents_the_end_is_held_out() -> None:
    corpus = FakeCorpus([[10] * 10, [10] * 10])
    training, validation = hold_out(corpus, 0.25)
    assert validation.starts.tolist() == [150, 160, 170, 180, 190]
    assert validation.starts_document.tolist() == [True, False, False, False, False]
    assert training.num_tokens == 150
    assert corpus.starts_document.tolist() == ([True] + [False] * 9) * 2  # the corpus itself is left alone
    assert validation.tokens_per_byte == pytest.approx(1 / 3)
    assert hold_out(SimpleNamespace(**vars(FakeCorpus([[100]]))), 0.1)[0].num_tokens == 0
