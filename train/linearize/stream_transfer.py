"""Attention transfer layer by layer: a layer learns all that it will, then the hidden states go on to the next.

The same steps on the same batches as in `transfer`, where all layers learn side by side: each learns from the teacher's
own inputs, so the order does not matter. Which step had the best weights is known when the last layer has been scored;
until then the weights of every scored step are kept on the disk.

What is the same but for rounding is not so for a mixer that draws random numbers, as a dropout of windows does: there
each layer draws its own, where in memory the layers draw in turn.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lm_zoo.files import whole_file
from lm_zoo.linearized.interface import softmax
from lm_zoo.train.linearize.controls import ROWS, Observer
from lm_zoo.train.linearize.data import Batch, PackedRows
from lm_zoo.train.linearize.loop import StageLoop
from lm_zoo.train.linearize.spec import Transfer
from lm_zoo.train.linearize.stream_hidden import HiddenBatch, HiddenRows, first_groups
from lm_zoo.train.linearize.stream_student import HEAD, StreamedStudent
from lm_zoo.train.linearize.transfer import LayerLosses


class Seen(Exception):
    """The attention was seen; what the layer would do with it is not wanted."""


class LayerLoop(StageLoop):
    """A `StageLoop` of one layer, which keeps the weights of every step that is scored."""

    def __init__(self, *arguments, layer: int, keep: Callable[[int], None], **options) -> None:
        super().__init__(*arguments, **options)
        self.layer, self._keep = layer, keep

    def _score(self) -> None:
        super()._score()
        self._keep(self.step)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"layer": self.layer}


class Snapshots:
    """The weights of each layer's mixer after every scored step, and each layer's history, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, layer: int, step: int, parameters: dict[str, nn.Parameter]) -> None:
        with whole_file(self.folder / f"{layer}.{step}.safetensors") as unfinished:
            save_file({name: value.detach().cpu().contiguous() for name, value in parameters.items()}, unfinished)

    @torch.no_grad()
    def take(self, layer: int, step: int, parameters: dict[str, nn.Parameter]) -> None:
        saved = load_file(self.folder / f"{layer}.{step}.safetensors")
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])

    def finish(self, layer: int, result: dict[str, Any]) -> None:
        """From here on the layer is done."""
        with whole_file(self.folder / f"{layer}.json") as unfinished:
            unfinished.write_text(json.dumps(result), encoding="utf-8")

    def finished(self, layer: int) -> dict[str, Any] | None:
        path = self.folder / f"{layer}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def joint_history(histories: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The history of all layers together: the means over the layers."""
    joint = []
    for entries in zip(*histories, strict=True):
        training = [entry["training"] for entry in entries if entry["training"] is not None]
        joint.append(
            {
                "step": entries[0]["step"],
                "training": sum(training) / len(training) if training else None,
                "held_out": sum(entry["held_out"] for entry in entries) / len(entries),
            }
        )
    return joint


def layer_loss(
    student: StreamedStudent, layer: int, batch: HiddenBatch, options: Transfer, gradient_factor: float | None = None
) -> Tensor:
    """As `transfer.layer_losses` for one layer, on a batch of its inputs."""
    losses = LayerLosses(options, gradient_factor)

    def observe(*arguments) -> Tensor:
        losses(*arguments)
        raise Seen

    with torch.no_grad(), student.observed(observe), contextlib.suppress(Seen):
        student.passed(layer, batch.hidden, batch.cu_seqlens)
    return losses.losses[layer]


def mean_loss(student: StreamedStudent, layer: int, hidden: HiddenRows, options: Transfer) -> float:
    """The mean of `layer_loss` over the tokens of all rows that are kept."""
    total, count = 0.0, 0
    for batch in hidden.batches():
        tokens = batch.input_ids.shape[1]
        total += float(layer_loss(student, layer, batch.to(student.device), options)) * tokens
        count += tokens
    return total / count


@torch.no_grad()
def embed(student: StreamedStudent, hidden: HiddenRows) -> None:
    def embedded(batch: Batch) -> Tensor:
        batch = batch.to(student.device)
        return student.embedded(batch.input_ids, batch.cu_seqlens)

    hidden.embed(embedded)


@torch.no_grad()
def advance(student: StreamedStudent, layer: int, hidden: HiddenRows, observer: Observer | None) -> None:
    """Takes the rows through a layer; with the observer `softmax` it is the teacher's."""

    def passed(batch: HiddenBatch) -> Tensor:
        batch = batch.to(student.device)
        return student.passed(layer, batch.hidden, batch.cu_seqlens)

    with contextlib.nullcontext() if observer is None else student.observed(observer):
        hidden.advance(layer, passed)


def _from_nothing(student: StreamedStudent, rows: PackedRows, max_tokens: int, size: int, folder: Path) -> HiddenRows:
    """The first rows of a text, in a folder without what a killed run may have left there."""
    shutil.rmtree(folder, ignore_errors=True)
    width = student.config.hidden_size
    return HiddenRows(folder, rows, first_groups(rows, size, max_tokens), width=width, dtype=student.dtype)


def walk(student: StreamedStudent, hidden: HiddenRows, observer: Observer | None) -> Iterator[int]:
    """Takes the rows from the embedding through all layers, and says before each which it is."""
    embed(student, hidden)
    for layer in range(len(student.attention_layers)):
        with student.holding(layer):
            yield layer
            advance(student, layer, hidden, observer)


@torch.no_grad()
def perplexity(
    student: StreamedStudent, rows: PackedRows, max_tokens: int, folder: Path, observer: Observer | None = None
) -> float:
    """As `controls.perplexity`."""
    hidden = _from_nothing(student, rows, max_tokens, ROWS, folder)
    for _ in walk(student, hidden, observer):
        pass
    total, count = 0.0, 0
    with student.holding(HEAD):
        for batch in hidden.batches():
            batch = batch.to(student.device)
            index, targets = batch.next_tokens()
            finished = student.finished(batch.hidden, batch.cu_seqlens)[0, index]
            total += student.head_loss(finished, targets, reduction="none").double().sum().item()
            count += len(targets)
    shutil.rmtree(folder)
    return math.exp(min(total / count, 709.0))


@torch.no_grad()
def layer_errors(
    student: StreamedStudent, rows: PackedRows, max_tokens: int, folder: Path, options: Transfer
) -> dict[int, float]:
    """As `transfer.mean_losses`: each replaced layer's loss on the teacher's hidden states."""
    hidden = _from_nothing(student, rows, max_tokens, options.batch, folder)
    errors = {}
    for layer in walk(student, hidden, softmax):
        if student.attention_layers[layer].mixer is not None:
            errors[layer] = mean_loss(student, layer, hidden, options)
    shutil.rmtree(folder)
    return errors
