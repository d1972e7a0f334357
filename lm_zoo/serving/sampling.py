"""How a text chooses its tokens and when it ends, each text in a batch in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-30  # a temperature below that is not 0 in float64 but may be in float32
MAX_STOPS = 16
MAX_STOP = 256  # characters
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    r"""p = softmax(logits / temperature), cut to the likeliest tokens; the token at u p's sum of its running sum.

    Args:
        temperature: 0 takes the likeliest token every time.
        top_p: cut to the likeliest tokens that hold this much of the probability, in (0, 1].
        top_k: cut to so many tokens before that; 0 for all.
        max_tokens: tokens to write at most; `None` for as many as the engine and the model take.
        stop: strings that end the text; none of them is part of it.
        seed: of the numbers u: the same seed, prompt and options give the same text, whoever else is in the batch, up
            to the rounding of products of other shapes. A random one if not given.
        logprobs: how many of the likeliest tokens to report at every step with their log-probabilities, beside that of
            the token itself: those of the model, at temperature 1 and without a cut. `None` for none at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 1e6), ("top_p", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and low <= value <= high) or (name == "top_p" and value == 0):
                expected = "above 0 and at most 1" if name == "top_p" else f"from 0 to {high:g}"
                raise ValueError(f"{name} must be {expected}, got {value}")
        limits = {"top_k": (0, 2**31), "max_tokens": (1, 2**31), "seed": (-(2**63), 2**64)}
        for name, (low, high) in (limits | {"logprobs": (0, MAX_LOGPROBS + 1)}).items():
            value = getattr(self, name)
            if value is None and name != "top_k":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if not low <= value < high:
                raise ValueError(f"{name} must be from {low} to {high - 1}, got {value}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) for stop in self.stop):
            raise TypeError(f"stop must be a tuple of strings, got {self.stop!r}")
        if len(self.stop) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP for stop in self.stop):
            raise ValueError(f"stop must be at most {MAX_STOPS} strings, each of 1 to {MAX_STOP} characters")


@dataclass(frozen=True)
class Logprobs:
    """Of one token: its own log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Chooser:
    """The next tokens of a batch whose row n goes by `samplings[n]`."""

    def __init__(self, samplings: list[Sampling], device: torch.device):
        self.warm = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        counts = [sampling.logprobs for sampling in samplings]
        self.reported = [(row, count) for row, count in enumerate(counts) if count is not None]
        warm = [samplings[row] for row in self.warm]
        place = {"dtype": torch.float64, "device": device}
        self.temperature = torch.tensor([max(sampling.temperature, COLDEST) for sampling in warm], **place)[:, None]
        self.cut = [row for row, sampling in enumerate(warm) if sampling.top_p < 1 or sampling.top_k > 0]
        self.top_p = torch.tensor([warm[row].top_p for row in self.cut], **place)
        self.top_k = torch.tensor([warm[row].top_k or 2**31 for row in self.cut], device=device)

    def choose(self, logits: Tensor, draws: list[float]) -> tuple[list[int | None], dict[int, Logprobs]]:
        """A token of every row of `[n, V]`, and what its text reports of it.

        Args:
            draws: for every row a number u in [0, 1).

        Returns:
            `None` in place of a token where the logits are not finite.
        """
        best, ids = logits.max(dim=-1)
        if self.warm:
            x = logits[self.warm].to(torch.promote_types(logits.dtype, torch.float32))
            # Less the largest first, so that no quotient overflows.
            p = ((x - best[self.warm, None]) / self.temperature.to(x.dtype)).softmax(dim=-1)
            if self.cut:
                p[self.cut] = likeliest(p[self.cut], self.top_p, self.top_k)
            total = p.cumsum(dim=-1, dtype=torch.float64)
            u = total.new_tensor([draws[row] for row in self.warm])[:, None] * total[:, -1:]
            drawn = torch.searchsorted(total, u, right=True).squeeze(1)
            ids[self.warm] = drawn.clamp_max(logits.shape[1] - 1)
        finite = best.isfinite().tolist()
        tokens = [token if fine else None for token, fine in zip(ids.tolist(), finite, strict=True)]
        logprobs = {row: _logprobs(logits[row], tokens[row], count) for row, count in self.reported if finite[row]}
        return tokens, logprobs


def likeliest(p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """`[n, V]` with zeros but for the `top_k` likeliest, and of those but for the likeliest that hold `top_p` of them.

    Tokens as likely as the last one that is kept are kept, too.
    """
    first = _descending(p)
    held = first.cumsum(dim=-1, dtype=torch.float64)
    left = held.gather(1, top_k.clamp_max(p.shape[1])[:, None] - 1)  # what the cut to top_k leaves
    kept = (held - first < top_p[:, None] * left).sum(dim=-1).minimum(top_k)
    floor = first.gather(1, kept.clamp_min(1)[:, None] - 1)  # NaN is never below
    return p.masked_fill(p < floor, 0)


def _descending(p: Tensor) -> Tensor:
    """The values of each row in order; on a CPU by NumPy, which sorts several times as fast."""
    if p.device.type != "cpu":
        return p.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(p.numpy(), axis=-1)).flip(-1)


def _logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Logprobs(token, logprobs[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
