"""Selective copying: some tokens, scattered among blanks, have to be said again in their order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic.mqar import distinct
from lm_zoo.eval.synthetic.task import Examples, Task


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Letters at random places among blanks, then as many marks, at which the letters are asked for in order.

        tokens   _ b _ _ a _ d _ _ b   M M M M        targets   . . . . . . . . . .   b a d b

    Generated: `data` letters of `letters`, independent and uniform, at places of the first T - data tokens, drawn
    without repetition; all else there is blank, token `letters`; then `data` marks M, token `letters + 1`. Loss: at the
    marks. Metric: accuracy over all marks. Distances vary, so a model has to choose by content what it keeps: a
    recurrence that is the same at every token cannot. Paper: Gu and Dao 2023, arXiv 2312.00752, after Jing et al. 2019.

    Attributes:
        letters: kinds of letters.
        data: letters of a text.
    """

    paper = "Gu and Dao 2023, arXiv 2312.00752"
    letters: int = 14
    data: int = 16

    def __post_init__(self) -> None:
        for name, least in (("letters", 2), ("data", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def vocab_size(self) -> int:
        return self.letters + 2

    @property
    def chance(self) -> float:
        return 1 / self.letters

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 2 * self.data:
            raise ValueError(f"length must be at least 2 * data = {2 * self.data}, got {length}")
        letters = torch.randint(self.letters, (count, self.data), generator=generator)
        places = distinct(count, length - self.data, self.data, generator).sort(dim=1).values
        tokens = torch.full((count, length), self.letters).scatter_(1, places, letters)
        tokens[:, -self.data :] = self.letters + 1
        targets = torch.full((count, length), IGNORE)
        targets[:, -self.data :] = letters
        return Examples(tokens, targets)
