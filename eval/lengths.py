"""What a model makes of longer texts than it was trained on: its loss by position, and with ever more context.

    by length:    the same tokens, scored with the n - s tokens before them, n = L, 2 L, .. 16 L: what more context does
    by position:  the loss at token t of texts of 16 L tokens, t = 1 .. 16 L - 1: what being far from the start does

Both from spans of s = L / 2 tokens, spread over the text. A model that makes use of what is far away falls with n, one
that cannot stays, and one that breaks beyond its training rises.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_zoo.errors import UserError
from lm_zoo.eval.perplexity import TOKENS_PER_CALL, token_nats
from lm_zoo.linearized import LinearizedForCausalLM

FACTORS = (1, 2, 4, 8, 16)
SPANS = 32  # of scored tokens, at most
BINS = 4  # of positions, from one to twice as many


@dataclass(frozen=True)
class Lengths:
    """Means in nats per token.

    Attributes:
        length: L, tokens of a training text.
        limit: how many positions the model has; `None` if any number. Longer texts are not in `by_length`.
        scored: tokens that each length is measured on.
        by_length: [n, nats].
        by_position: [first, last, nats], positions from 0 on, the last one included.
    """

    length: int
    limit: int | None
    scored: int
    by_length: list[tuple[int, float]]
    by_position: list[tuple[int, int, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_lengths(model: PreTrainedModel, ids: Tensor, length: int, *, spans: int = SPANS) -> Lengths:
    """The loss on the tokens `ids` `[n]` by length and by position, see the module's docstring.

    Raises UserError for a text that is shorter than the longest length, or a length beyond the model's positions.
    """
    limit = position_limit(model)
    lengths = [factor * length for factor in FACTORS if limit is None or factor * length <= limit]
    if length < 2:
        raise UserError(f"length must be at least 2 tokens, got {length}")
    if not lengths:
        raise UserError(f"length {length} exceeds the model's {limit} positions; choose at most {limit}")
    longest, scored = lengths[-1], length // 2
    if len(ids) < longest:
        raise UserError(
            f"the text has {len(ids)} tokens, and {longest} are read at once: give a longer text or a smaller length"
        )
    count = min(spans, (len(ids) - longest) // scored + 1)
    ends = [longest + round(i * (len(ids) - longest) / max(1, count - 1)) for i in range(count)]
    by_length = []
    for n in lengths:
        nats = torch.cat([token_nats(model, rows).double().cpu() for rows in _texts(model, ids, ends, n)])
        by_length.append((n, nats[:, -scored:].mean().item()))
    return Lengths(length, limit, count * scored, by_length, _in_bins(nats.mean(dim=0)))


def _texts(model: PreTrainedModel, ids: Tensor, ends: list[int], length: int):
    """The `length` tokens before each end, a few texts at a time."""
    rows = torch.stack([ids[end - length : end] for end in ends]).to(model.device)
    return rows.split(max(1, TOKENS_PER_CALL // length))


def _in_bins(nats: Tensor) -> list[tuple[int, int, float]]:
    """The loss of tokens 1, 2, .. in bins that grow with the position."""
    powers = (round(2 ** (i / BINS)) for i in range(BINS * math.ceil(math.log2(len(nats) + 1)) + 1))
    edges = sorted({min(edge, len(nats) + 1) for edge in powers})
    return [(a, b - 1, nats[a - 1 : b - 1].mean().item()) for a, b in itertools.pairwise(edges)]


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions a model has; `None` for those of the zoo, which take any number."""
    if isinstance(model, LinearizedForCausalLM):
        name = model.family.positions
        return None if name is None else getattr(model.teacher.config, name)
    return getattr(model.config, "max_position_embeddings", None)


def as_perplexity(nats: float) -> float:
    return math.exp(min(nats, 709.0))  # a broken model still gets a number that JSON can hold
