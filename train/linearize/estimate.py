"""What a linearization will take, from the teacher's configuration alone: no weight is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.modules.loss import CHUNK_ELEMENTS
from lm_zoo.train.linearize.recover import projections
from lm_zoo.train.linearize.run import fitting
from lm_zoo.train.linearize.sizes import duration, size
from lm_zoo.train.linearize.spec import LinearizeSpec, Recover, Stage
from lm_zoo.train.linearize.teacher import load_config
from lm_zoo.train.linearize.transfer import mixer_parameters
from lm_zoo.train.memory import peak_memory

RESERVE = 2**27  # bytes that Python and its libraries take beside all that is counted here
ACHIEVED = 0.4  # of the speed of large matrix products, in training
BESIDE = 1.6e6  # operations' time per token and layer for all else; measured on a CPU, it counts for small teachers


@dataclass(frozen=True)
class Estimate:
    """The student without its weights, the spec for its teacher, the dtype of the work, and operations per second."""

    student: LinearizedForCausalLM
    spec: LinearizeSpec
    dtype: torch.dtype
    speed: float

    @classmethod
    def of(cls, teacher: str | Path, spec: LinearizeSpec, tflops: float | None = None) -> Estimate:
        """tflops: speed of the machine; by default that of a matrix product, measured here."""
        if tflops is not None and not tflops > 0:
            raise UserError(f"--tflops {tflops} must be above 0")
        student = student_on_meta(teacher, spec)
        spec = fitting(spec, student.teacher)
        cuda = torch.cuda.is_available() or tflops is not None
        dtype = student.dtype if cuda else torch.float32
        return cls(student, spec, dtype, measured_speed(dtype) if tflops is None else tflops * 1e12)

    def seconds(self, stage: Stage) -> float:
        """Of training, for a text as long as the stage's tokens."""
        return stage_flops(self.student, stage) * stage.tokens / self.speed / ACHIEVED


def estimate(teacher: str | Path, spec: LinearizeSpec, tflops: float | None = None) -> list[str]:
    """Lines about memory, disk and time of a linearization in memory; the time for a text as long as the tokens."""
    found = Estimate.of(teacher, spec, tflops)
    student, stages = found.student, found.spec.stages
    weights = count(student) * found.dtype.itemsize
    peak = {name: weights + stage_memory(student, stage, found.dtype) for name, stage in stages.items()}
    elsewhere = tflops is not None or torch.cuda.is_available()  # not in this process's memory
    started = 0 if elsewhere else peak_memory(torch.device("cpu")) + RESERVE
    return [
        *head_lines(found, tflops),
        f"memory for the weights: {size(weights)}",
        *(f"memory for {name}: {size(value + started)}" for name, value in peak.items()),
        f"peak memory: {size(max(peak.values(), default=weights) + started)}",
        f"disk: {size(weights)} for the student, {size(checkpoint_bytes(student, found.spec))} beside it for "
        "checkpoints until it is done",
        *time_lines(found),
    ]


def head_lines(found: Estimate, tflops: float | None) -> list[str]:
    student = found.student
    return [
        f"{count(student):,} parameters, {count_mixers(student):,} of them new, in {found.dtype}".replace("torch.", ""),
        f"speed: {found.speed / 1e12:.3g} TFLOP/s, " + ("measured here" if tflops is None else "as given"),
    ]


def time_lines(found: Estimate, reading: float | None = None) -> list[str]:
    """reading: seconds for weights that come from the disk over and over."""
    lines = [
        f"{name}: {trained_parameters(found.student, stage):,} parameters trained, {stage.tokens:,} tokens in "
        f"{duration(found.seconds(stage))}"
        for name, stage in found.spec.stages.items()
    ]
    seconds = sum(found.seconds(stage) for stage in found.spec.stages.values())
    if reading is None:
        how = f"at {ACHIEVED:.0%} of that speed; measurements and reading come on top"
    else:
        how = f"at {ACHIEVED:.0%} of that speed and with the reading; measurements come on top"
    return [*lines, f"time: {duration(seconds + (reading or 0.0))}, {how}"]


def student_on_meta(teacher: str | Path, spec: LinearizeSpec) -> LinearizedForCausalLM:
    """The student without its weights: shapes only."""
    config = load_config(teacher)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        spec = fitting(spec, model)
        return LinearizedForCausalLM.from_teacher(model, spec.mixer, dict(spec.options), list(spec.keep_layers))


def trained_parameters(student: LinearizedForCausalLM, stage: Stage) -> int:
    mixers = count_mixers(student)
    if not isinstance(stage, Recover):
        return mixers
    if stage.parameters == "all":
        return count(student)
    shapes = [student.get_submodule(name).weight.shape for name in projections(student, stage.projections)]
    return stage.rank * sum(map(sum, shapes)) + stage.train_mixers * mixers


def stage_memory(student: LinearizedForCausalLM, stage: Stage, dtype: torch.dtype) -> int:
    """Bytes beside the weights: gradients, AdamW's two moments, the best weights so far, and activations.

    In the transfer those of one layer are alive, in the recovery of all.
    """
    tokens = stage.batch * stage.length
    memory = 4 * trained_parameters(student, stage) * 4
    if not isinstance(stage, Recover):
        return memory + layer_memory(student, tokens, dtype, backward=True) + weights_memory(student, stage)
    layers = len(student.attention_layers)
    memory += layers * layer_memory(student, tokens, dtype, backward=True)
    memory += 3 * 4 * max(CHUNK_ELEMENTS, student.teacher.config.vocab_size)
    if stage.parameters == "all" and stage.kl > 0:
        memory += count(student) * dtype.itemsize  # the teacher's own copy
    return memory


def layer_memory(student: LinearizedForCausalLM, tokens: int, dtype: torch.dtype, *, backward: bool = False) -> int:
    """Bytes of a layer's activations, in vectors of the hidden size and of the MLP's per token.

    As measured of Llamas with 64 channels per head and a hybrid mixer, in whose backward pass features, windows and
    states count most.
    """
    config = student.teacher.config
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    hidden, of_mlp = (48, 5) if backward else (16, 4)
    return tokens * (hidden * config.hidden_size + of_mlp * inner) * dtype.itemsize


def weights_memory(student: LinearizedForCausalLM, stage: Stage) -> int:
    """Bytes for the attention weights of a text, where the stage compares them."""
    compares = not isinstance(stage, Recover) and stage.weights_cross_entropy > 0
    return compares * 6 * 4 * student.teacher.config.num_attention_heads * stage.length**2


def checkpoint_bytes(student: LinearizedForCausalLM, spec: LinearizeSpec) -> int:
    """Mixers, and of all that is trained the weights, the best ones and two moments; twice, as one replaces another."""
    trained = max((trained_parameters(student, stage) for stage in spec.stages.values()), default=0)
    return 2 * 4 * (count_mixers(student) + 4 * trained)


def stage_flops(student: LinearizedForCausalLM, stage: Stage) -> float:
    """Operations per token: 2 per weight forward and 4 backward, the teacher's quadratic attention, and `BESIDE`.

    The transfer only goes backward through the mixers; adapters leave out the gradients of the frozen weights.
    """
    config = student.teacher.config
    weights = count(student) - student.get_input_embeddings().weight.numel()
    attention = 2 * stage.length * config.hidden_size * config.num_hidden_layers
    beside = BESIDE * config.num_hidden_layers
    if not isinstance(stage, Recover):
        return beside + 2 * weights + attention + 4 * attention * (stage.weights_cross_entropy > 0)
    forward_and_backward = 6 * weights if stage.parameters == "all" else 4 * weights
    return beside + forward_and_backward + (2 * weights + attention) * (stage.kl > 0)


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


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_mixers(student: LinearizedForCausalLM) -> int:
    return sum(parameter.numel() for parameter in mixer_parameters(student).values())
