"""Weight decay where it belongs, and learning rates as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lm_zoo.errors import UserError
from lm_zoo.model import Block
from lm_zoo.modules.feature_maps import FeatureMap

# Decays, lower bounds of gates and phases: shrinking them would change what a layer forgets, and where it looks.
GATE_PARAMETERS = ("A_log", "A_imaginary", "dt_bias", "logits", "theta")


def parameter_groups(model: nn.Module, weight_decay: float, *, muon: bool = False) -> list[dict]:
    """Groups for the optimizer. Matrices decay; norms, biases, gate parameters, feature maps and what carries
    `_no_weight_decay` do not. With `muon`, the weights of the linear maps inside the blocks are a group for Muon."""
    feature_maps = {id(p) for part in model.modules() if isinstance(part, FeatureMap) for p in part.parameters()}
    blocks = [part for part in model.modules() if isinstance(part, Block)] if muon else []
    hidden = {id(part.weight) for block in blocks for part in block.modules() if isinstance(part, nn.Linear)}
    matrices, decayed, kept = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        is_gate = last in GATE_PARAMETERS or getattr(parameter, "_no_weight_decay", False)
        if parameter.ndim < 2 or last == "bias" or is_gate or id(parameter) in feature_maps:
            kept.append(parameter)
        else:
            (matrices if id(parameter) in hidden else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [*groups, {"params": matrices, "weight_decay": weight_decay, "muon": True}] if muon else groups


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step, as a part of its peak.

    It rises linearly from 0 over the first `warmup` part of all steps, and ends at `final`. In between, by `name`:
        cosine: falls along a half cosine (Loshchilov and Hutter 2016).
        linear: falls along a straight line.
        wsd: stays at the peak, then falls in the last `decay` part as 1 - sqrt(x) (Hägele et al. 2024).
        constant: stays at the peak to the end.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "linear", "wsd", "constant"):
            raise UserError(f"schedule {self.name!r} is not known; choose cosine, linear, wsd or constant")
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
        start = total_steps - round(self.decay * total_steps) if self.name == "wsd" else warmup_steps
        done = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
        fallen = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "wsd": math.sqrt(done)}
        return 1 - (1 - self.final) * fallen[self.name]
