"""Parity: whether the number of ones so far is odd, which no state can follow whose eigenvalues are all above 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from lm_zoo.eval.synthetic.task import Examples, Task


@dataclass(frozen=True)
class Parity(Task):
    """Bits, and after each of them the parity of all so far.

        tokens  1 0 1 1 ...         targets  1 1 0 1 ...        target_t = (x_1 + ... + x_t) mod 2

    Generated: independent fair bits. Loss: at every token, so that a text of 40 bits teaches all lengths up to 40.
    Metric: accuracy at the last token. A model is trained on short texts and tested on longer ones. Paper: Grazzi et
    al. 2024, arXiv 2411.12537, who show that a linear recurrence needs an eigenvalue below 0 for it.
    """

    paper = "Grazzi et al. 2024, arXiv 2411.12537"
    metric = "last"

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / 2

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        bits = torch.randint(2, (count, length), generator=generator)
        return Examples(bits, bits.cumsum(dim=1) % 2)
