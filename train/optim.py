"""AdamW with weight decay where it belongs, and learning rates as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lm_zoo.errors import UserError

# Decays, lower bounds of gates and phases: shrinking them would change what a layer forgets, and where it looks.
GATE_PARAMETERS = ("A_log", "A_imaginary", "dt_bias", "logits", "theta")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups. Matrices decay; norms, biases, gate parameters and what carries `_no_weight_decay` do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_gate = name.rpartition(".")[2] in GATE_PARAMETERS or getattr(parameter, "_no_weight_decay", False)
        (kept if parameter.ndim < 2 or is_gate else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float, fused: bool
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=1e-8, fused=fused
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step, as a part of its peak.

    It rises linearly from 0 over the first `warmup` part of all steps, and ends at `final`. In between, by `name`:
        cosine: falls along a half cosine (Loshchilov and Hutter 2016).
        wsd: stays at the peak, then falls in the last `decay` part as 1 - sqrt(x) (Hägele et al. 2024).
        constant: stays at the peak to the end.
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "wsd", "constant"):
            raise UserError(f"schedule {self.name!r} is not known; choose cosine, wsd or constant")
        for option in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, option) <= 1:
                raise UserError(f"schedule: {option}={getattr(self, option)} must be a part of the whole, from 0 to 1")
        if self.name == "wsd" and self.warmup + self.decay > 1:
            raise UserError(f"schedule: warmup={self.warmup} and decay={self.decay} exceed the whole run; lower one")

    def __call__(self, step: int, total_steps: int) -> float:
        """For optimizer step `step`, counted from 0, of a run of `total_steps`."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        start = warmup_steps if self.name == "cosine" else total_steps - round(self.decay * total_steps)
        done = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
        fallen = (1 - math.cos(math.pi * done)) / 2 if self.name == "cosine" else math.sqrt(done)
        return 1 - (1 - self.final) * fallen
