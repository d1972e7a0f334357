"""Texts for the stages: each one framed as the teacher's tokenizer frames it, cut to a length, packed into rows.

A row holds texts of `length` tokens together, and a batch is some rows as one packed sequence [1, T] with `cu_seqlens`,
so nothing is computed for padding and no text sees another. Which rows a step takes is a pure function of the seed and
the step (`RowOrder`).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm_zoo.errors import UserError
from lm_zoo.train.corpus import Corpus, tokenise
from lm_zoo.train.packing import Selection, hold_out
from lm_zoo.train.sources import Piece, Source, Table, TextFiles, file_source, find_files
from lm_zoo.train.tokenizers import END_OF_TEXT

SHORTEST = 2  # tokens of a text: one to see and one to predict


@dataclass(frozen=True)
class TextOptions:
    """Where the text comes from.

    Attributes:
        files: text, JSON-lines or parquet files: paths, globs, or @FILE with one path per line.
        dataset: instead of files, the name or folder of a `datasets` dataset.
        config, split, text_column, streaming: of the dataset, or of the tables.
        separator: what stands between the documents of a text file.
        max_tokens: of a dataset that is streamed.
        val_files: files with the held-out text; without them a part of the text is held out.
        cache_dir: where tokenised text is kept.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    separator: str = END_OF_TEXT
    max_tokens: int | None = None
    val_files: tuple[str, ...] = ()
    cache_dir: Path = Path("~/.cache/lm_zoo")

    def source(self) -> Source:
        if bool(self.files) == bool(self.dataset):
            raise UserError("give text files or the name of a dataset, one of both")
        if self.dataset:
            return Table(self.dataset, config=self.config, split=self.split, **self._of_tables)
        return self.file_source(self.files)

    def file_source(self, files: Sequence[str]) -> Source:
        return file_source(find_files(files), separator=self.separator, **self._of_tables)

    @property
    def _of_tables(self) -> dict[str, Any]:
        return {"text_column": self.text_column, "streaming": self.streaming, "column_option": "--text-column"}

    def corpus(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """The tokens of a source, made once and kept in the cache."""
        cache = Path(self.cache_dir).expanduser().absolute()
        return Corpus(tokenise(Trimmed(source), tokenizer, cache, max_tokens=self.max_tokens))


@dataclass(frozen=True)
class Trimmed:
    """A source without the white space around its documents, which stands between them and belongs to none."""

    source: TextFiles | Table

    @property
    def streaming(self) -> bool:
        return getattr(self.source, "streaming", False)

    def identity(self) -> list:
        return ["trimmed", *self.source.identity()]

    def shards(self) -> Iterator[dict[str, list]]:
        return self.source.shards()

    def what(self) -> str:
        return self.source.what()

    def pieces(self, rows: dict[str, list]) -> Iterator[Piece]:
        for piece in self.source.pieces(rows):
            text = piece.text.lstrip() if piece.starts_document else piece.text
            yield Piece(text.rstrip() if piece.ends_document else text, piece.starts_document, piece.ends_document)


@dataclass(frozen=True)
class Batch:
    """Texts end to end: `input_ids` [1, T], and their borders `cu_seqlens` [N + 1]."""

    input_ids: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.cu_seqlens.to(device))

    def next_tokens(self) -> tuple[Tensor, Tensor]:
        """For each token that has a next one in its text: its index, and the next token. Both [targets]."""
        has_next = torch.ones(self.input_ids.shape[1], dtype=torch.bool, device=self.input_ids.device)
        has_next[self.cu_seqlens[1:].long() - 1] = False
        index = has_next.nonzero().squeeze(1)
        return index, self.input_ids[0, index + 1]


class Texts:
    """Texts of at most `length` tokens, cut from a selection of a corpus, each with the tokenizer's own frame.

    What a document has beyond `length` tokens is further texts; those too short to learn from are left out.
    """

    def __init__(self, selection: Selection, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._selection = selection
        self._ends = np.cumsum(selection.lengths)
        self._prefix = prefix(tokenizer)
        self.spans: list[tuple[int, int]] = []  # where each text lies in the selection's tokens
        room = length - len(self._prefix)
        for start, end in self._documents(tokenizer.eos_token_id):
            for first in range(start, end, room):
                last = min(first + room, end)
                if last - first + len(self._prefix) >= SHORTEST:
                    self.spans.append((first, last))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.concatenate([self._prefix, self._read(*self.spans[index])])

    def lengths(self) -> list[int]:
        return [end - start + len(self._prefix) for start, end in self.spans]

    def _documents(self, end_of_text: int) -> Iterator[tuple[int, int]]:
        """Where documents start and end, without the end-of-text token: whether texts end is not ours to teach."""
        if not len(self._ends):
            return
        borders = np.flatnonzero(self._selection.starts_document)
        starts = (self._ends - self._selection.lengths)[borders]
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), int(self._ends[-1])], strict=True):
            if start < end:
                yield start, end - int(self._read(end - 1, end)[0] == end_of_text)

    def _read(self, start: int, end: int) -> np.ndarray:
        pieces, parts = self._selection, []
        piece = bisect.bisect_right(self._ends, start)
        while start < end:
            skip = start - int(self._ends[piece] - pieces.lengths[piece])
            count = min(end - start, int(pieces.lengths[piece]) - skip)
            parts.append(pieces.corpus.tokens(int(pieces.starts[piece]) + skip, count))
            start, piece = start + count, piece + 1
        return np.concatenate(parts).astype(np.int64)


class Joined:
    """Several `Texts` as one, in order."""

    def __init__(self, parts: Sequence[Texts]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part][index - int(self._starts[part])]

    def lengths(self) -> list[int]:
        return [length for part in self._parts for length in part.lengths()]


class PackedRows:
    """Rows of at most `length` tokens, each of whole texts; row i is a list of texts."""

    def __init__(self, texts: Texts | Joined, length: int) -> None:
        self.texts = texts
        self.rows = pack(texts.lengths(), length)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        tokens = [self.texts[text] for row in rows for text in self.rows[row]]
        borders = np.cumsum([0, *map(len, tokens)])
        ids = torch.from_numpy(np.concatenate(tokens))[None]
        return Batch(ids, torch.from_numpy(borders).to(torch.int32))

    def batches(self, rows_per_batch: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """All rows in order, up to about `max_tokens`."""
        seen = 0
        for start in range(0, len(self.rows), rows_per_batch):
            if max_tokens is not None and seen >= max_tokens:
                return
            batch = self.batch(range(start, min(start + rows_per_batch, len(self.rows))))
            seen += batch.input_ids.shape[1]
            yield batch


@dataclass(frozen=True)
class LinearizeData:
    """The text of one linearization, in three parts that share no document where the text has enough of them.

    `training` is learnt from, `choosing` says which weights were the best, and `measuring` gives the reported numbers.
    `sampled` is text of the teacher's own, which is learnt from as well.
    """

    training: Selection
    choosing: Selection
    measuring: Selection
    tokenizer: PreTrainedTokenizerBase
    sampled: Selection | None = None

    @classmethod
    def load(cls, options: TextOptions, tokenizer: PreTrainedTokenizerBase, val_fraction: float) -> LinearizeData:
        check_tokenizer(tokenizer)

        def corpus(source: Source) -> Corpus:
            return options.corpus(source, tokenizer)

        everything = corpus(options.source())
        if options.val_files:
            training = Selection.all_of(everything)
            held_out = Selection.all_of(corpus(options.file_source(options.val_files)))
        else:
            training, held_out = hold_out(everything, val_fraction)
        return cls(training, *_halves(held_out), tokenizer)

    def rows(self, part: str, length: int) -> PackedRows:
        """The rows of the part "training", "choosing" or "measuring"."""
        texts = Texts(getattr(self, part), self.tokenizer, length)
        if part == "training" and self.sampled is not None:
            texts = Joined([texts, Texts(self.sampled, self.tokenizer, length)])
        rows = PackedRows(texts, length)
        if not len(rows):
            what = "to train on" if part == "training" else "held out"
            raise UserError(f"there is no text {what}; give more of it, or another part with --val-fraction")
        return rows


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise UserError("the teacher's tokenizer has no fast version (tokenizer.json); save it with one")
    if tokenizer.eos_token_id is None:
        raise UserError("the teacher's tokenizer has no end-of-text token, which ends documents; give it one")


def _halves(selection: Selection) -> tuple[Selection, Selection]:
    """Every other document; a single document is both halves."""
    document = np.cumsum(selection.starts_document)
    halves = selection.where(document % 2 == 0), selection.where(document % 2 == 1)
    return halves if all(len(half.starts) for half in halves) else (selection, selection)


def prefix(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens that the tokenizer puts before every text, such as a beginning-of-sequence token."""
    framed, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return np.array(framed[:before], dtype=np.int64)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Items of the given lengths in rows of at most `size`, the longest first, each where it fits most tightly."""
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the space that is left in them
    spaces = 0  # bit s is set where with_space[s] is not empty
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        wide_enough = spaces >> length
        if wide_enough:
            space = length + (wide_enough & -wide_enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(item)
        else:
            space, row = size, len(rows)
            rows.append([item])
        left = space - length
        with_space[left].append(row)
        spaces |= 1 << left
    return rows
