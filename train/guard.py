"""Which optimizer steps are taken: not those with a gradient that is not finite, nor those whose loss is a spike.

All of it is decided on the device, with tensors of one number, so that nobody waits for a GPU: the optimizer takes the
decision as a tensor, and the counts are read where something is logged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_zoo.errors import UserError

MEMORY = 50  # steps: before so many no loss is a spike, and from then on older ones fade
SMALLEST_DEVIATION = 0.02  # of the mean: a run of nearly equal losses is no reason to call the next one a spike
FIELDS = ("count", "mean", "variance", "in_a_row", "most_in_a_row", "not_finite", "spikes")


class StepGuard:
    """Mean and variance of the losses so far, and how many steps were skipped.

    A loss is a spike where it exceeds the mean by `threshold` standard deviations; a skipped step's loss does not enter
    them. `report` holds numbers as of the latest `read`.

    Args:
        threshold: in standard deviations; `None` only looks for what is not finite.
        most_skipped: so many skipped steps in a row end the run.
    """

    def __init__(self, threshold: float | None, most_skipped: int) -> None:
        self.threshold, self.most_skipped = threshold, most_skipped
        self._state: dict[str, Tensor] = {}
        self._loaded: list[float] = [0.0] * len(FIELDS)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1 where the step is to be skipped, else 0; both arguments are scalars and the same on all processes."""
        loss = loss.detach().to(_widest(loss.device))
        state = self._on(loss.device)
        not_finite = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        spike = torch.zeros_like(not_finite)
        if self.threshold is not None:
            deviation = torch.maximum(state["variance"].sqrt(), SMALLEST_DEVIATION * state["mean"].abs())
            spike = (state["count"] >= MEMORY) & (loss > state["mean"] + self.threshold * deviation) & ~not_finite
        skip = not_finite | spike
        taken = (~skip).to(loss.dtype)
        state["count"] += taken
        difference = torch.where(skip, 0.0, loss - state["mean"])
        share = taken / state["count"].clamp(min=1, max=MEMORY)
        state["mean"] += share * difference
        state["variance"].copy_((1 - share) * (state["variance"] + share * difference.square()))
        state["in_a_row"].copy_((state["in_a_row"] + 1) * skip)
        state["most_in_a_row"].copy_(torch.maximum(state["most_in_a_row"], state["in_a_row"]))
        state["not_finite"] += not_finite
        state["spikes"] += spike
        return 1 - taken

    def read(self, step: int) -> dict[str, float]:
        """The counts as numbers, for which the device is waited for. UserError where too many stand in a row."""
        counts = dict(zip(FIELDS, self._numbers(), strict=True))
        if counts["most_in_a_row"] >= self.most_skipped:
            raise diverged(step, counts)
        if self._state:
            self._state["most_in_a_row"].copy_(self._state["in_a_row"])
        return counts

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(FIELDS, self._numbers(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded, self._state = [state[name] for name in FIELDS], {}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if not self._state:
            values = torch.tensor(self._loaded, dtype=_widest(device), device=device)
            self._state = dict(zip(FIELDS, values.unbind(), strict=True))
        return self._state

    def _numbers(self) -> list[float]:
        return torch.stack(list(self._state.values())).tolist() if self._state else self._loaded


def diverged(step: int, counts: dict[str, float]) -> UserError:
    return UserError(
        f"{int(counts['most_in_a_row'])} steps in a row were skipped by step {step}. Of the run's steps, "
        f"{int(counts['not_finite'])} had a loss or a gradient that was not finite, and in {int(counts['spikes'])} the "
        f"loss was a spike (it is usually {counts['mean']:.4g}). Lower model.learning_rate or raise model.warmup, then "
        "start anew, or resume from an earlier checkpoint"
    )


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
