"""One stage of training, step by step: AdamW, a schedule, clipping, and the weights that were best on held-out text.

The loop is plain, because attention transfer calls backward once per layer in the middle of the forward pass. Random
numbers (of dropout) are drawn anew from the seed and the step, so a step is a function of the parameters, the
optimizer's state and the step's number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from lm_zoo.errors import UserError
from lm_zoo.train.linearize.data import Batch, PackedRows
from lm_zoo.train.linearize.spec import Stage
from lm_zoo.train.order import RowOrder


class StageLoop:
    """Trains `parameters` as a `Stage` says.

    Args:
        name: of the stage, for messages.
        parameters: what is trained, by name.
        clip_groups: names of parameters whose gradients are clipped together.
        backward: adds a batch's gradients, times the factor it is given, and returns the batch's loss.
        validate: the loss on held-out text.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        rows: PackedRows,
        parameters: dict[str, nn.Parameter],
        *,
        clip_groups: Sequence[Sequence[str]],
        backward: Callable[[Batch, float], Tensor],
        validate: Callable[[], float],
        device: torch.device,
        seed: int,
        log: Callable[[str], None],
    ) -> None:
        self.name, self.stage, self.rows, self.parameters = name, stage, rows, parameters
        self.clip_groups = [[parameters[member] for member in group] for group in clip_groups]
        self.backward, self.validate, self.device, self.seed, self.log = backward, validate, device, seed, log
        self.has_diverged = False
        self.order = RowOrder(len(rows), min(stage.batch, len(rows)), seed=seed)
        self.steps = stage.steps(len(rows))
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=stage.learning_rate, weight_decay=stage.weight_decay
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []  # step, training loss since the last entry, held-out loss
        self._best: dict[str, Tensor] = {}
        self._losses: list[float] = []  # of the steps since the last entry of the history

    @property
    def best_step(self) -> int:
        return min(self.history, key=lambda entry: entry["held_out"])["step"]

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """To the end of the stage, which leaves the best weights. `after_step` may raise, and a later run goes on."""
        while True:
            started = time.monotonic()
            if self._is_due(self.step) and not (self.history and self.history[-1]["step"] == self.step):
                self._score()
            if self.step == self.steps:
                break
            self._train()
            self.seconds += time.monotonic() - started
            after_step()
        with torch.no_grad():
            for name, value in self._best.items():
                self.parameters[name].copy_(value)

    def _train(self) -> None:
        self.optimizer.zero_grad()
        total = 0.0
        parts = self.stage.accumulate
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 2**32 + self.step)
            for part in range(parts):
                batch = self.rows.batch(self.order.batch(self.step * parts + part)).to(self.device)
                total += float(self.backward(batch, 1 / parts)) / parts
                self.tokens += batch.input_ids.shape[1]
        norms = [float(clip_grad_norm_(group, self.stage.clip)) for group in self.clip_groups]
        if not math.isfinite(total + sum(norms)):
            raise self._diverged()
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate(self.step, self.steps)
        self.optimizer.step()
        self._losses.append(total)
        self.step += 1

    def _is_due(self, step: int) -> bool:
        """At the start, at the end, and at even distances in between."""
        share = self.stage.validations / self.steps
        return step in (0, self.steps) or math.floor(step * share) > math.floor((step - 1) * share)

    def _score(self) -> None:
        held_out = self.validate()
        if not math.isfinite(held_out):
            raise self._diverged()
        if not self.history or held_out < min(entry["held_out"] for entry in self.history):
            self._best = {name: value.detach().clone() for name, value in self.parameters.items()}
        training = sum(self._losses) / len(self._losses) if self._losses else None
        self.history.append({"step": self.step, "training": training, "held_out": held_out})
        self._losses = []
        shown = f", training {training:.4g}" if training is not None else ""
        self.log(f"{self.name}, step {self.step:,} of {self.steps:,}: held out {held_out:.4g}{shown}")

    def _diverged(self) -> UserError:
        self.has_diverged = True
        return UserError(
            f"the loss of the stage {self.name} is not finite after step {self.step} of {self.steps}; "
            f"lower its learning rate ({self.stage.learning_rate:g}) with --{type(self.stage).__name__.lower()}-lr"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "history": self.history, "losses": self._losses, "best": self._best,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.history, self._losses = state["history"], state["losses"]
        self._best = {name: value.to(self.device) for name, value in state["best"].items()}
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
