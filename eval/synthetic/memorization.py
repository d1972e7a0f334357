"""Memorization of MAD: facts that are in no text, so that only parameters can hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size


@dataclass(frozen=True)
class Memorization(Task):
    """Keys, each followed by a gap; the value that belongs there is the same in all texts, and is never shown.

        tokens  k_3 [gap] k_5 [gap] k_3 [gap]           targets at the gaps: v(k_3), v(k_5), v(k_3)

    Generated: keys uniform; a value for each key, no two alike, drawn once from `seed`. Loss and metric: the value, at
    each gap. Mixing tokens is no help beyond one step: the task measures what channels keep. Paper: Poli et al. 2024,
    "Mechanistic design and scaling of hybrid architectures" (MAD), arXiv 2403.17844, which varies from vocabulary 256,
    length 32, 256 texts.

    Attributes:
        vocabulary: number of tokens: keys, values in the same number or one more, and the gap.
        seed: of the values, which training and test texts have to share.
    """

    paper = "Poli et al. 2024, arXiv 2403.17844"

    vocabulary: int = 256
    seed: int = 12345

    def __post_init__(self) -> None:
        check_size("vocabulary", self.vocabulary)
        if self.vocabulary < 3:
            raise UserError(f"vocabulary must be at least 3, for a key, a value and the gap, got {self.vocabulary}")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def num_keys(self) -> int:
        return (self.vocabulary - 1) // 2

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1 - self.num_keys)

    @property
    def values(self) -> Tensor:
        """The value of each key, `[num_keys]`."""
        number = self.vocabulary - 1 - self.num_keys
        order = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))
        return self.num_keys + order[: self.num_keys]

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 2 or length % 2:
            raise UserError(f"length must be even and at least 2, for a key and its gap, got {length}")
        keys = torch.randint(self.num_keys, (count, length // 2), generator=generator)
        tokens = torch.full((count, length), self.vocabulary - 1)
        tokens[:, ::2] = keys
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 1::2] = self.values[keys]
        return Examples(tokens, targets)
