"""Induction: what followed a special token the first time has to follow it the second time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic.task import Examples, Task


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens with a special one somewhere among them and once more at the end.

        tokens   b  d  a  S  c  b  b  a ... d  S        targets   .  .  .  .  .  .  .  . ...  .  c

    Generated: `letters` ordinary tokens, independent and uniform; the special token S, numbered `letters`, at the last
    position and at one other, uniform over those that leave room for a token after it. Loss: at the last token alone.
    Metric: accuracy there. What has to be found does not stand at a fixed distance, so a convolution whose weights do
    not depend on the text cannot find it. Paper: Gu and Dao 2023, arXiv 2312.00752, after Olsson et al. 2022.

    Attributes:
        letters: ordinary tokens.
    """

    paper = "Gu and Dao 2023, arXiv 2312.00752"
    metric = "last"
    letters: int = 15

    def __post_init__(self) -> None:
        if self.letters < 2:
            raise ValueError(f"letters must be at least 2, got {self.letters}")

    @property
    def vocab_size(self) -> int:
        return self.letters + 1

    @property
    def chance(self) -> float:
        return 1 / self.letters

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 3:
            raise ValueError(f"length must be at least 3, got {length}")
        tokens = torch.randint(self.letters, (count, length), generator=generator)
        place = torch.randint(length - 2, (count, 1), generator=generator)
        targets = torch.full((count, length), IGNORE)
        targets[:, -1:] = tokens.gather(1, place + 1)
        tokens[:, -1] = self.letters
        return Examples(tokens.scatter_(1, place, self.letters), targets)
