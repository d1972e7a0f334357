"""What a linearization will take, from the teacher's configuration alone: no weight is read."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.modules.loss import CHUNK_ELEMENTS
from lm_zoo.train.linearize.recover import projections
from lm_zoo.train.linearize.run import fitting
from lm_zoo.train.linearize.spec import LinearizeSpec, Recover, Stage
from lm_zoo.train.linearize.teacher import load_config
from lm_zoo.train.linearize.transfer import mixer_parameters

ACHIEVED = 0.4  # of the speed of large matrix products, in training
GIB = 2**30


def estimate(teacher: str | Path, spec: LinearizeSpec, tflops: float | None = None) -> list[str]:
    """Lines about memory, disk and time; the time for a text as long as the stages' tokens.

    tflops: speed of the machine; by default that of a matrix product, measured here.
    """
    if tflops is not None and not tflops > 0:
        raise UserError(f"--tflops {tflops} must be above 0")
    student = student_on_meta(teacher, spec)
    spec = fitting(spec, student.teacher)
    cuda = torch.cuda.is_available() or tflops is not None
    dtype = student.dtype if cuda else torch.float32
    weights = _count(student) * dtype.itemsize
    speed = measured_speed(dtype) if tflops is None else tflops * 1e12
    lines = [
        f"{_count(student):,} parameters, {_count_mixers(student):,} of them new, in {dtype}".replace("torch.", ""),
        f"speed: {speed / 1e12:.3g} TFLOP/s, " + ("measured here" if tflops is None else "as given"),
        f"memory for the weights: {_gib(weights)}",
    ]
    peak, seconds = weights, 0.0
    for name, stage in spec.stages.items():
        trained = trained_parameters(student, stage)
        memory = weights + stage_memory(student, stage, trained, dtype)
        stage_seconds = stage_flops(student, stage) * stage.tokens / speed / ACHIEVED
        lines.append(
            f"{name}: {trained:,} parameters trained, {_gib(memory)} of memory, {stage.tokens:,} tokens in "
            f"{_time(stage_seconds)}"
        )
        peak, seconds = max(peak, memory), seconds + stage_seconds
    checkpoint = max((4 * trained_parameters(student, stage) * 4 for stage in spec.stages.values()), default=0)
    lines += [
        f"peak memory: {_gib(peak)}",
        f"disk: {_gib(weights)} for the student, {_gib(checkpoint)} beside it for checkpoints until it is done",
        f"time: {_time(seconds)}, at {ACHIEVED:.0%} of that speed; measurements and reading come on top",
    ]
    return lines


def student_on_meta(teacher: str | Path, spec: LinearizeSpec) -> LinearizedForCausalLM:
    """The student without its weights: shapes only."""
    config = load_config(teacher)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        spec = fitting(spec, model)
        return LinearizedForCausalLM.from_teacher(model, spec.mixer, dict(spec.options), list(spec.keep_layers))


def trained_parameters(student: LinearizedForCausalLM, stage: Stage) -> int:
    mixers = _count_mixers(student)
    if not isinstance(stage, Recover):
        return mixers
    if stage.parameters == "all":
        return _count(student)
    shapes = [student.get_submodule(name).weight.shape for name in projections(student, stage.projections)]
    return stage.rank * sum(map(sum, shapes)) + stage.train_mixers * mixers


def stage_memory(student: LinearizedForCausalLM, stage: Stage, trained: int, dtype: torch.dtype) -> int:
    """Bytes beside the weights: gradients, AdamW's two moments, the best weights so far, and activations.

    Of a layer about 16 vectors of the hidden size and four of the MLP's are alive per token; in the transfer those of
    one layer, in the recovery of all.
    """
    config = student.teacher.config
    tokens = stage.batch * stage.length
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = tokens * (16 * config.hidden_size + 4 * inner) * dtype.itemsize
    memory = 4 * trained * 4 + layer
    if isinstance(stage, Recover):
        memory += layer * (config.num_hidden_layers - 1) + 3 * 4 * max(CHUNK_ELEMENTS, config.vocab_size)
        if stage.parameters == "all" and stage.kl > 0:
            memory += _count(student) * dtype.itemsize  # the teacher's own copy
    elif stage.weights_cross_entropy > 0:
        memory += 6 * 4 * config.num_attention_heads * stage.length**2
    return memory


def stage_flops(student: LinearizedForCausalLM, stage: Stage) -> float:
    """Operations per token: 2 per weight forward and 4 backward, and the teacher's quadratic attention.

    The transfer only goes backward through the mixers; adapters leave out the gradients of the frozen weights.
    """
    config = student.teacher.config
    weights = _count(student) - student.get_input_embeddings().weight.numel()
    attention = 2 * stage.length * config.hidden_size * config.num_hidden_layers
    if not isinstance(stage, Recover):
        return 2 * weights + attention + 4 * attention * (stage.weights_cross_entropy > 0)
    forward_and_backward = 6 * weights if stage.parameters == "all" else 4 * weights
    return forward_and_backward + (2 * weights + attention) * (stage.kl > 0)


def measured_speed(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_mixers(student: LinearizedForCausalLM) -> int:
    return sum(parameter.numel() for parameter in mixer_parameters(student).values())


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
