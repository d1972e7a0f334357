r"""Which guesses stay (Leviathan et al. 2023, arXiv 2211.17192): the text is distributed as if there had been none.

    keep g_i with probability min(1, p_i(g_i) / q_i(g_i)), up to the first that goes
    in its place a token of max(0, p_i - q_i) / sum; after all K of them one of p_{K+1}

p_i is the model's distribution after the guesses before i, q_i the one that g_i was drawn from; a guess that was not
drawn has q_i = 1 there. Without sampling g_i stays where it is the model's likeliest token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits.

    Attributes:
        temperature: 0 takes the likeliest token every time.
        top_k: only among that many likeliest ones; among all if not given.
        top_p: only among the likeliest ones that hold this much of the probability; among all if not given.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """`[..., V]` to `[..., V]`, in float32 at least; as transformers' `generate` has them."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        scores = TemperatureLogitsWarper(float(self.temperature))(None, scores)
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p is not None and self.top_p < 1:
            scores = TopPLogitsWarper(float(self.top_p))(None, scores)
        return scores.softmax(dim=-1).view(logits.shape)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """A token of each row of logits `[B, V]`: `[B]`, and the distribution it was drawn from, `[B, V]`."""
        if self.greedy:
            return logits.argmax(dim=-1), None
        q = self.probabilities(logits)
        return torch.multinomial(q, 1, generator=generator)[:, 0], q


def accept(
    logits: Tensor, guesses: Tensor, q: Tensor | None, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """How many guesses stay, `[B]`, and the token after them, `[B]`.

    Args:
        logits: the model's, `[B, K + 1, V]`, of the tokens that follow the text and each guess.
        guesses: `[B, K]`.
        q: what they were drawn from, `[B, K, V]`; `None` where they were not drawn, or are not to be sampled.
    """
    rows, count = torch.arange(len(guesses), device=guesses.device), guesses.shape[1]
    if sampling.greedy:
        likeliest = logits.argmax(dim=-1)
        kept = (guesses == likeliest[:, :count]).cumprod(dim=1).sum(dim=1)
        return kept, likeliest[rows, kept]
    p = sampling.probabilities(logits)
    q = F.one_hot(guesses, p.shape[-1]).to(p.dtype) if q is None else q.to(p.dtype)
    at = guesses[..., None]
    chance = torch.rand(guesses.shape, generator=generator, dtype=p.dtype, device=p.device)
    stays = chance * q.gather(-1, at)[..., 0] < p[:, :count].gather(-1, at)[..., 0]
    kept = stays.cumprod(dim=1).sum(dim=1)
    p, q = p[rows, kept], F.pad(q, (0, 0, 0, 1))[rows, kept]
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q but for the rounding
    return kept, torch.multinomial(rest, 1, generator=generator)[:, 0]
