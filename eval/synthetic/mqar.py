"""Multi-query associative recall: many keys with a value each, and later some of the keys again, all to be answered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic.task import Examples, Task

POWER = -0.99
ROWS = 1024  # drawn at a time: a draw without replacement holds a number per row and key of the vocabulary


@dataclass(frozen=True)
class MQAR(Task):
    """Pairs of a key and a value, then every key once more among random tokens.

        tokens   k1 v1 k2 v2 k3 v3   k2  .  .  .  k1  .  k3  .  ...
        targets   .  .  .  .  .  .   v2  .  .  .  v1  .  v3  .  ...

    Generated: keys from [1, V/2) and values from [V/2, V), each without repetition in a text; `pairs` pairs, which are
    the context. Slot g = 1, 2, ... is the pair of tokens that begins 2 (g - 1) tokens after the context; every key is
    asked at the first token of one slot, drawn without repetition with p(g) ~ g^-0.99, so that most questions come
    soon. All tokens that are left are random. Loss: at the queries, whose target is the value. Metric: accuracy over
    all queries. Paper: Arora et al. 2023, arXiv 2312.04927.

    Attributes:
        vocabulary: V.
        pairs: keys of a text; a text needs 4 tokens for each.
    """

    paper = "Arora et al. 2023, arXiv 2312.04927"
    vocabulary: int = 8192
    pairs: int = 8

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if self.vocabulary % 2 or self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocabulary must be even and have more than 2 * pairs = {2 * self.pairs} tokens, got {self.vocabulary}"
            )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 2 / self.vocabulary

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 4 * self.pairs:
            raise ValueError(f"length must be at least 4 * pairs = {4 * self.pairs}, got {length}")
        drawn = [self._draw(min(ROWS, count - start), length, generator) for start in range(0, count, ROWS)]
        tokens, targets = (torch.cat(rows) for rows in zip(*drawn, strict=True))
        return Examples(tokens, targets)

    def _draw(self, count: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + distinct(count, half - 1, self.pairs, generator)
        values = half + distinct(count, half, self.pairs, generator)
        slots = (length - context) // 2
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** POWER
        slot = torch.multinomial(weights.expand(count, slots), self.pairs, generator=generator)
        tokens = torch.randint(self.vocabulary, (count, length), generator=generator)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        queries = context + 2 * slot
        targets = torch.full((count, length), IGNORE).scatter_(1, queries, values)
        return tokens.scatter_(1, queries, keys), targets


def distinct(rows: int, kinds: int, count: int, generator: Generator) -> Tensor:
    """`[rows, count]` numbers in [0, kinds), without repetition in a row."""
    return torch.rand(rows, kinds, generator=generator).topk(count, dim=1).indices
