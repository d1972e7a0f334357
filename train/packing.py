"""Rows of `seq_len` tokens cut from the corpus, and the batches made of them.

Documents follow one another, each ended by the end-of-text token, and the whole is cut into rows. With document borders
respected, a batch of B rows is one packed sequence [1, B * seq_len] whose `cu_seqlens` mark each document and each row,
so nothing is read across a border: neither by attention, nor by a recurrent state, nor by a short convolution.

The model shifts labels itself (`labels[t]` is predicted from token t - 1), so the label at the first token of every
segment is masked: it would be predicted from the document before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lm_zoo.train.corpus import Corpus
from lm_zoo.train.curriculum import cut

IGNORE = -100
FEW_DOCUMENTS = 100  # below this, holding out whole documents is too coarse


@dataclass(frozen=True)
class Selection:
    """Some of a corpus's pieces, in order: where each one's tokens lie, and whether a document starts with it."""

    corpus: Corpus
    starts: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    starts_document: np.ndarray

    @classmethod
    def all_of(cls, corpus: Corpus) -> Selection:
        return cls(corpus, corpus.starts, corpus.lengths, corpus.num_bytes, corpus.starts_document)

    def where(self, keep: np.ndarray) -> Selection:
        columns = ("starts", "lengths", "num_bytes", "starts_document")
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def tokens_per_byte(self) -> float:
        return self.num_tokens / max(1, int(self.num_bytes.sum()))


def hold_out(corpus: Corpus, fraction: float) -> tuple[Selection, Selection]:
    """The training and the validation part of a corpus; the same text gives the same parts, whenever and wherever.

    A document is held out when the hash of its text falls in the given fraction, so it stays held out when other
    documents come or go. Of a corpus of a few documents, the end of the text is held out instead.
    """
    if corpus.starts_document.sum() >= FEW_DOCUMENTS:
        held_out = corpus.keys < int(fraction * 2**63)
    else:
        bytes_to_the_end = np.cumsum(corpus.num_bytes[::-1])[::-1]
        held_out = bytes_to_the_end <= fraction * corpus.num_bytes.sum()
        held_out[-1] = fraction > 0
    everything = Selection.all_of(corpus)
    training, validation = everything.where(~held_out), everything.where(held_out)
    if len(validation.starts):
        validation.starts_document[0] = True  # it may begin in the middle of one
    return training, validation


class Rows(Dataset):
    """Row i is tokens [i * seq_len, (i + 1) * seq_len) of a selection. What does not fill a last row is left out.

    A row is `(tokens, borders)`: tokens int64 [seq_len], and the positions at which segments start; the first is 0.
    Asked for as `(i, length)`, its segments are cut at so many tokens.
    """

    def __init__(self, selection: Selection, seq_len: int, max_tokens: int | None = None) -> None:
        self.selection, self.seq_len = selection, seq_len
        self._ends = np.cumsum(selection.lengths)
        tokens = selection.num_tokens if max_tokens is None else min(selection.num_tokens, max_tokens)
        self._length = tokens // seq_len

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        if isinstance(index, tuple):
            row, borders = self[index[0]]
            return row, cut(borders, self.seq_len, index[1])
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        pieces, row = self.selection, np.empty(self.seq_len, dtype=np.int64)
        borders, filled, start = [0], 0, index * self.seq_len
        piece = int(np.searchsorted(self._ends, start, side="right"))
        skip = start - int(self._ends[piece] - pieces.lengths[piece])  # tokens of the piece that earlier rows took
        while filled < self.seq_len:
            if filled > 0 and pieces.starts_document[piece]:
                borders.append(filled)
            count = min(int(pieces.lengths[piece]) - skip, self.seq_len - filled)
            row[filled : filled + count] = pieces.corpus.tokens(int(pieces.starts[piece]) + skip, count)
            filled, piece, skip = filled + count, piece + 1, 0
        return row, borders

    def longest(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the longest part of a document in each of these rows."""
        starts = (self._ends - self.selection.lengths)[self.selection.starts_document]  # where documents start
        first, last = np.searchsorted(starts, rows * self.seq_len), np.searchsorted(starts, (rows + 1) * self.seq_len)
        inside = (starts[i:j] - row * self.seq_len for row, i, j in zip(rows, first, last, strict=True))
        return np.array([np.diff(borders, prepend=0, append=self.seq_len).max() for borders in inside])


def collate_documents(rows: list[tuple[np.ndarray, list[int]]]) -> dict[str, Tensor | int]:
    """One packed sequence: `input_ids` and `labels` [1, B * seq_len], `cu_seqlens` [N + 1] int32."""
    input_ids = torch.from_numpy(np.concatenate([tokens for tokens, _ in rows]))
    offset, starts = 0, []
    for tokens, borders in rows:
        starts += [offset + border for border in borders]
        offset += len(tokens)
    labels = input_ids.clone()
    labels[starts] = IGNORE
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "cu_seqlens": torch.tensor([*starts, offset], dtype=torch.int32),
        "num_targets": offset - len(starts),
    }


def collate_rows(rows: list[tuple[np.ndarray, list[int]]]) -> dict[str, Tensor | int]:
    """Rows as they are: `input_ids` and `labels` [B, seq_len]. The model sees through document borders."""
    input_ids = torch.from_numpy(np.stack([tokens for tokens, _ in rows]))
    return {"input_ids": input_ids, "labels": input_ids, "num_targets": input_ids.numel() - len(rows)}
