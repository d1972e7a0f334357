"""Needle in a haystack: a fact among thousands of tokens that say nothing, asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.mqar import distinct
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size


@dataclass(frozen=True)
class Needle(Task):
    """Facts `[fact] key value` at random places among random words, and questions at the end.

        tokens  w w w [fact] k_2 v_2 w w [fact] k_1 v_1 w w w [ask] k_1 v_1 [ask] k_2
        targets at the keys after [ask]:                            v_1           v_2

    Generated: words uniform; keys distinct, values uniform, places uniform among those where facts do not overlap.
    Loss and metric: the values that are asked for, at their keys. The state has to keep n facts for as long as the
    text is, while the rest asks for nothing: unlike MQAR, the load does not grow with the length. The vocabulary is
    this project's own; `lm_zoo.eval.needle_text` is the same for real models. Papers: Kamradt 2023 (the pressure test
    of long contexts); Hsieh et al. 2024, "RULER", arXiv 2404.06654, where more than one needle is from.

    Attributes:
        needles: number of facts.
        questions: number of facts that are asked for, in random order.
        keys, values, words: numbers of tokens of each kind.
        depth: None, or where the only needle is, from 0 (at the start) to 1 (just before the question).
    """

    paper = "Hsieh et al. 2024, arXiv 2404.06654"

    needles: int = 1
    questions: int = 1
    keys: int = 64
    values: int = 64
    words: int = 128
    depth: float | None = None

    def __post_init__(self) -> None:
        for name in ("needles", "questions", "keys", "values", "words"):
            check_size(name, getattr(self, name))
        if self.needles > self.keys:
            raise UserError(f"needles = {self.needles} need as many keys, got keys = {self.keys}")
        if self.questions > self.needles:
            raise UserError(f"questions = {self.questions} ask for more than needles = {self.needles}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UserError(f"depth must be in [0, 1], got {self.depth}")
        if self.depth is not None and self.needles > 1:
            raise UserError(f"depth is that of a single needle, got needles = {self.needles}; leave depth out")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.words + 2

    @property
    def chance(self) -> float:
        return 1 / self.values

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        shortest = 3 * self.needles + 3 * self.questions - 1
        if length < shortest:
            raise UserError(
                f"length must be at least {shortest} for needles = {self.needles} and questions = {self.questions}, "
                f"got {length}"
            )
        fact, ask = self.vocab_size - 2, self.vocab_size - 1
        first_word = self.keys + self.values
        hay = length - 3 * self.questions + 1
        keys = distinct(count, self.keys, self.needles, generator)
        values = self.keys + torch.randint(self.values, (count, self.needles), generator=generator)
        tokens = torch.randint(first_word, first_word + self.words, (count, length), generator=generator)
        facts = torch.stack([torch.full_like(keys, fact), keys, values], dim=2)
        places = self._places(count, hay, generator)
        tokens.scatter_(1, (places[:, :, None] + torch.arange(3)).flatten(1), facts.flatten(1))
        asked = distinct(count, self.needles, self.questions, generator)
        questions = facts.gather(1, asked[:, :, None].expand(-1, -1, 3))
        questions[:, :, 0] = ask
        tokens[:, hay:] = questions.flatten(1)[:, :-1]
        targets = torch.full_like(tokens, IGNORE)
        targets[:, hay + 1 :: 3] = questions[:, :, 2]
        return Examples(tokens, targets)

    def _places(self, count: int, hay: int, generator: Generator) -> Tensor:
        """Where facts start, `[count, needles]`, so that none overlaps another or leaves the `hay` first tokens."""
        if self.depth is not None:
            return torch.full((count, 1), round(self.depth * (hay - 3)))
        # A fact counts as one place here and is widened to three after it was drawn.
        places = distinct(count, hay - 2 * self.needles, self.needles, generator).sort(dim=1).values
        return places + 2 * torch.arange(self.needles)
