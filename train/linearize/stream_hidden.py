"""Hidden states between two layers, on the disk: one file per group of rows, `GROUP.LAYER`, the input of that layer.

A file of the next layer is written under a temporary name, renamed, and only then the file before it is removed. So
whenever a run is killed, each group stands at one layer, whole, and the disk holds each hidden state once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm_zoo.errors import UserError
from lm_zoo.files import whole_file
from lm_zoo.train.linearize.data import Batch, PackedRows
from lm_zoo.train.linearize.stream_weights import read_bytes


@dataclass(frozen=True)
class HiddenBatch(Batch):
    """A batch, and what a layer gets of it: `hidden` [1, T, D]."""

    hidden: Tensor

    def to(self, device: torch.device) -> HiddenBatch:
        return HiddenBatch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


class HiddenRows:
    """Some rows of a text as a layer gets them. Where `StageLoop` takes `PackedRows`, it takes these.

    Args:
        folder: of the files; those that are there already are gone on with.
        rows: all rows of the text.
        groups: numbers of the rows that are kept here, in groups that pass a layer together.
        width, dtype: of a hidden state.
    """

    def __init__(
        self, folder: Path, rows: PackedRows, groups: Sequence[Sequence[int]], *, width: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.rows, self.groups, self.width, self.dtype = folder, rows, groups, width, dtype
        lengths = rows.texts.lengths()
        self._place: dict[int, tuple[int, int, int]] = {}  # of a row: its group, its first token there, its tokens
        for number, group in enumerate(groups):
            start = 0
            for row in group:
                length = sum(lengths[text] for text in rows.rows[row])
                self._place[row] = (number, start, length)
                start += length
        folder.mkdir(parents=True, exist_ok=True)
        self.layers: list[int | None] = [None] * len(groups)
        for path in folder.glob("[0-9]*.[0-9]*"):
            number, layer = map(int, path.name.split("."))
            if self.layers[number] is None or layer > self.layers[number]:
                self.layers[number] = layer

    def __len__(self) -> int:
        return len(self.rows)

    def embed(self, embedded: Callable[[Batch], Tensor]) -> None:
        """Makes what the first layer gets."""
        for number, layer in enumerate(self.layers):
            if layer is None:
                self._write(number, 0, embedded(self.rows.batch(self.groups[number])))

    def advance(self, layer: int, passed: Callable[[HiddenBatch], Tensor]) -> None:
        """From the input of the layer to the input of the next, in all groups that still stand there."""
        for number, at in enumerate(self.layers):
            if at == layer:
                self._write(number, layer + 1, passed(self.batch(self.groups[number])))

    def batch(self, rows: Sequence[int]) -> HiddenBatch:
        batch = self.rows.batch(rows)
        hidden = torch.cat([self._read(*self._place[row]) for row in rows])
        return HiddenBatch(batch.input_ids, batch.cu_seqlens, hidden[None])

    def batches(self) -> Iterator[HiddenBatch]:
        """All groups in order."""
        for group in self.groups:
            yield self.batch(group)

    def _path(self, number: int, layer: int) -> Path:
        return self.folder / f"{number:06d}.{layer}"

    def _read(self, number: int, start: int, length: int) -> Tensor:
        path = self._path(number, self.layers[number])
        with path.open("rb") as file:
            first = start * self.width * self.dtype.itemsize
            hidden = read_bytes(file, first, self.dtype, (length, self.width))
        if hidden is None:
            raise UserError(f"{path} is damaged; start anew without --resume")
        return hidden

    def _write(self, number: int, layer: int, hidden: Tensor) -> None:
        data = hidden.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        with whole_file(self._path(number, layer)) as unfinished:
            unfinished.write_bytes(memoryview(data.numpy()))
        before, self.layers[number] = self.layers[number], layer
        if before is not None:
            self._path(number, before).unlink(missing_ok=True)


def first_groups(rows: PackedRows, size: int, max_tokens: int) -> list[list[int]]:
    """The rows of `rows.batches(size, max_tokens)`."""
    lengths = rows.texts.lengths()
    groups: list[list[int]] = []
    seen = 0
    for start in range(0, len(rows), size):
        if seen >= max_tokens:
            break
        groups.append(list(range(start, min(start + size, len(rows)))))
        seen += sum(lengths[text] for row in groups[-1] for text in rows.rows[row])
    return groups


def groups_of(wanted: set[int], size: int) -> list[list[int]]:
    """Rows in order, in groups of `size`."""
    ordered = sorted(wanted)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
