"""Recovery: the whole student learns from text and from its teacher, through low-rank adapters or in all parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.linearized.inner import Context
from lm_zoo.linearized.interface import softmax
from lm_zoo.modules.loss import CHUNK_ELEMENTS
from lm_zoo.train.linearize.controls import replaced_layers
from lm_zoo.train.linearize.data import Batch, PackedRows
from lm_zoo.train.linearize.spec import Recover
from lm_zoo.train.linearize.transfer import mixer_parameters

# What the families call the linear maps of their attention, and which of q, k, v and o they make.
PROJECTIONS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "dense": "o", "c_proj": "o",
    "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
}  # fmt: skip


class Recovery:
    """A student in recovery. `finish()` merges the adapters, and leaves the student as it was but for its weights."""

    def __init__(self, student: LinearizedForCausalLM, options: Recover, seed: int) -> None:
        self.student, self.options = student, options
        self._adapters = self._reference = None
        self._waiting: set[int] = set()  # layers whose softmax is still to be replaced
        student.requires_grad_(False)
        if options.parameters == "all":
            # The teacher's weights will change under it, so that it needs its own.
            self._reference = copy.deepcopy(student) if options.kl > 0 else None
            student.requires_grad_(True)
        else:
            self._adapters = _adapters(student, options, seed)
        for parameter in mixer_parameters(student).values():
            parameter.requires_grad_(options.train_mixers or options.parameters == "all")

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.student.named_parameters() if value.requires_grad}

    def replace(self, step: int) -> None:
        """Go to a step of the stepwise replacement, counted from 1; a new `Recovery` has all mixers at work."""
        parts = self.options.replacement_steps
        layers = [module.layer_idx for module in replaced_layers(self.student)]
        self._waiting = {layer for number, layer in enumerate(layers) if number % parts >= step}

    def observer(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Softmax where the mixer is not at work yet."""
        if module.mixer is None or module.layer_idx in self._waiting:
            return softmax(module, q, k, v, context)
        return module.mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)

    def loss(self, batch: Batch) -> Tensor:
        """next_token * cross entropy + kl * divergence from the teacher: means over the tokens with a next one."""
        options, student = self.options, self.student
        index, targets = batch.next_tokens()
        with student.observed(self.observer):
            hidden = student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0, index]
        loss = hidden.new_zeros((), dtype=torch.float32)
        if options.next_token > 0:
            loss = loss + options.next_token * student.head_loss(hidden, targets)
        if options.kl > 0:
            teacher = self._reference or student
            with torch.no_grad(), teacher.observed(softmax), self._without_adapters():
                expected = teacher.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0, index]
            loss = loss + options.kl * divergence(hidden, expected, student.head, teacher.head)
        return loss

    def backward(self, batch: Batch, factor: float) -> Tensor:
        loss = self.loss(batch)
        (loss * factor).backward()
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows, max_tokens: int) -> float:
        total = count = 0
        for batch in rows.batches(self.options.batch, max_tokens):
            targets = len(batch.next_tokens()[1])
            total += float(self.loss(batch.to(self.student.device))) * targets
            count += targets
        return total / count

    def finish(self) -> None:
        if self._adapters is not None:
            self._adapters.merge_and_unload()
            self._adapters = None
        self._reference = None
        self.student.requires_grad_(True)

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        if self._adapters is None:
            yield
            return
        self._adapters.disable_adapter_layers()
        try:
            yield
        finally:
            self._adapters.enable_adapter_layers()


def divergence(
    hidden: Tensor, expected: Tensor, head: Callable[[Tensor], Tensor], teacher_head: Callable[[Tensor], Tensor]
) -> Tensor:
    """KL(teacher || student) in nats, the mean over tokens; hidden and expected `[N, D]`.

    Computed in chunks of tokens, whose logits are made anew for the backward pass: those of all tokens are never alive.
    """

    def chunk(hidden: Tensor, expected: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher_head(expected).float().log_softmax(dim=-1)
        return F.kl_div(head(hidden).float().log_softmax(dim=-1), target, log_target=True, reduction="sum")

    rows = max(1, CHUNK_ELEMENTS // head(hidden[:1]).shape[-1])
    parts = zip(hidden.split(rows), expected.split(rows), strict=True)
    return sum(checkpoint(chunk, h, e, use_reentrant=False) for h, e in parts) / len(hidden)


def projections(student: LinearizedForCausalLM, wanted: tuple[str, ...]) -> list[str]:
    """Names of the attention's linear maps that make any of what is wanted: q, k, v, o."""
    names = []
    for name, module in student.named_modules():
        parent, _, last = name.rpartition(".")
        in_attention = hasattr(student.get_submodule(parent), "softmax_window")
        is_wanted = set(PROJECTIONS.get(last, "")) & set(wanted)
        if in_attention and is_wanted and isinstance(module, nn.Linear | Conv1D):
            names.append(name)
    return names


def _adapters(student: LinearizedForCausalLM, options: Recover, seed: int):
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need the package peft: pip install peft, or set recover.parameters to all") from error
    names = projections(student, options.projections)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=names,
        fan_in_fan_out=isinstance(student.get_submodule(names[0]), Conv1D),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = peft.LoraModel(student, config, "default")
    for name, parameter in student.named_parameters():
        if "lora_" in name:  # 16 bits are too coarse to train in
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return adapters
