"""What a streamed linearization takes of memory and disk, and whether there is so much: told before it starts."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.modules.loss import CHUNK_ELEMENTS
from lm_zoo.train.linearize.controls import ROWS, replaced_layers
from lm_zoo.train.linearize.estimate import (
    RESERVE,
    Estimate,
    checkpoint_bytes,
    count,
    count_mixers,
    head_lines,
    layer_memory,
    time_lines,
    trained_parameters,
    weights_memory,
)
from lm_zoo.train.linearize.sampling import TEXTS_AT_A_TIME
from lm_zoo.train.linearize.sizes import duration, size
from lm_zoo.train.linearize.spec import LinearizeSpec, Recover, Stage
from lm_zoo.train.memory import peak_memory

CONTINUATION = 24  # tokens of the report's continuations: each takes all the weights from the disk
DISK_SPEED = 2e9  # bytes per second, of a solid-state disk; not measured, and said to be assumed


def check_streamable(spec: LinearizeSpec) -> None:
    """Whether every stage can do with one layer's weights."""
    if spec.recover is not None and spec.recover.parameters == "all":
        raise UserError(
            "recover.parameters: all holds gradients and moments of every weight, which mode stream has no memory for; "
            "set recover.parameters=lora, or leave the stage out with --no-recover"
        )


def memory_needed(student: LinearizedForCausalLM, spec: LinearizeSpec, dtype: torch.dtype) -> dict[str, int]:
    """Bytes at the peak of each part of the work, beside what the process has when it starts."""
    config = student.teacher.config
    blocks, head, largest = _parts(student, dtype)
    one_part = max(blocks, head) + largest  # a tensor is there twice while its dtype changes
    mixers = 4 * count_mixers(student)
    logits = 3 * 4 * max(CHUNK_ELEMENTS, config.vocab_size)
    needed = {"measuring": layer_memory(student, ROWS * spec.length, dtype) + logits}
    if spec.self_tokens > 0:
        cached = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize  # grouped heads need less
        needed["sampling (self_tokens)"] = TEXTS_AT_A_TIME * spec.length * cached + logits
    for name, stage in spec.stages.items():
        needed[name] = _stage(student, stage, dtype) + logits * isinstance(stage, Recover)
    return {name: value + one_part + mixers + RESERVE for name, value in needed.items()}


def _stage(student: LinearizedForCausalLM, stage: Stage, dtype: torch.dtype) -> int:
    tokens = stage.batch * stage.length
    trained = trained_parameters(student, stage)
    layers = len(student.attention_layers)
    memory = layer_memory(student, tokens, dtype, backward=True)
    if isinstance(stage, Recover):
        between = tokens * student.config.hidden_size * dtype.itemsize * (layers + 1)
        return memory + 4 * 4 * trained + between
    return memory + 4 * 4 * trained // len(replaced_layers(student)) + weights_memory(student, stage)


def _parts(student: LinearizedForCausalLM, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of the largest block, of the head, and of the largest tensor."""
    sizes: dict[str, int] = {}
    largest = 0
    mixers = {id(parameter) for module in replaced_layers(student) for parameter in module.mixer.parameters()}
    for name, parameter in student.teacher.base_model.named_parameters():
        list_name, _, rest = name.partition(".")
        if list_name == student.family.blocks and id(parameter) not in mixers:
            layer = rest.partition(".")[0]
            sizes[layer] = sizes.get(layer, 0) + parameter.numel() * dtype.itemsize
            largest = max(largest, parameter.numel() * dtype.itemsize)
    head = student.get_output_embeddings().weight.numel() * dtype.itemsize
    return max(sizes.values()), head, max(largest, head)


def check_memory(student: LinearizedForCausalLM, spec: LinearizeSpec, max_memory: int | None) -> None:
    """UserError unless all of the work fits into `max_memory` bytes."""
    if max_memory is None:
        raise UserError("mode stream needs a bound for its memory: give --max-memory, such as 8GiB")
    started = peak_memory(student.device)
    needed = memory_needed(student, spec, student.dtype)
    worst = max(needed, key=needed.get)
    if needed[worst] + started > max_memory:
        least = math.ceil((needed[worst] + started) / 2**20)
        raise UserError(
            f"--max-memory {size(max_memory)} is too little: {worst} needs {size(needed[worst] + started)}, "
            f"{size(started)} of it for the process itself; allow {least}MiB, or lower the batch or the length"
        )


def disk_needed(
    student: LinearizedForCausalLM, spec: LinearizeSpec, dtype: torch.dtype, tokens: int
) -> tuple[int, int]:
    """Bytes beside the output while the work goes on, and of the output; `tokens` of text that the transfer sees."""
    width = student.config.hidden_size * dtype.itemsize
    beside = width * (spec.measure_tokens + ROWS * spec.length)
    if spec.transfer is not None:
        scored = spec.transfer.validations + 1
        group = spec.transfer.batch * spec.transfer.length
        beside += width * (tokens + spec.measure_tokens + group) + 4 * count_mixers(student) * scored
    return beside + checkpoint_bytes(student, spec), count(student) * dtype.itemsize


def check_disk(output: Path, needed: tuple[int, int], taken: int) -> None:
    """UserError unless the disk of `output` has room; `taken` bytes of it are the unfinished run's already."""
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + taken
    if sum(needed) > free:
        raise UserError(
            f"{place} has {size(free)} free, and {size(sum(needed))} are needed: {size(needed[0])} for hidden states "
            f"and checkpoints until it is done, {size(needed[1])} for the student; free some space, choose another "
            "--output, or lower transfer.tokens"
        )


def folder_size(folder: Path) -> int:
    return sum(entry.stat().st_size for root, _, files in os.walk(folder) for entry in map(Path(root).joinpath, files))


def estimate_stream(
    teacher: str | Path, spec: LinearizeSpec, tflops: float | None = None, max_memory: int | None = None
) -> list[str]:
    """As `estimate`, of a linearization with mode stream."""
    check_streamable(spec)
    found = Estimate.of(teacher, spec, tflops)
    student, spec, dtype = found.student, found.spec, found.dtype
    elsewhere = tflops is not None or torch.cuda.is_available()
    started = 0 if elsewhere else peak_memory(torch.device("cpu"))
    needed = memory_needed(student, spec, dtype)
    bound = "" if max_memory is None else f"; --max-memory allows {size(max_memory)}"
    tokens = 0 if spec.transfer is None else spec.transfer.tokens
    beside, output = disk_needed(student, spec, dtype, tokens)
    read = bytes_read(student, spec, dtype)
    return [
        *head_lines(found, tflops),
        *(f"memory for {name}: {size(value + started)}" for name, value in needed.items()),
        f"peak memory: {size(max(needed.values()) + started)}{bound}",
        f"disk: {size(output)} for the student, {size(beside)} beside it for hidden states and checkpoints until it is "
        "done",
        f"read from the disk: {size(read)} of weights, in {duration(read / DISK_SPEED)} at an assumed "
        f"{DISK_SPEED / 1e9:g} GB/s",
        *time_lines(found, reading=read / DISK_SPEED),
    ]


def bytes_read(student: LinearizedForCausalLM, spec: LinearizeSpec, dtype: torch.dtype) -> int:
    """All weights once for each measurement and each token of a continuation, thrice or more for a step of recovery."""
    passes = 10 + 2 * CONTINUATION
    if (stage := spec.recover) is not None:
        training = stage.tokens // (stage.batch * stage.length) * (2 + (stage.kl > 0))
        held_out = min(spec.measure_tokens, stage.tokens) // (stage.batch * stage.length)
        passes += training + (stage.validations + 1) * held_out * (1 + (stage.kl > 0))
    if spec.self_tokens > 0:
        passes += spec.self_tokens // TEXTS_AT_A_TIME
    return passes * count(student) * dtype.itemsize
