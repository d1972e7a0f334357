"""Fuzzy in-context recall of MAD: keys and values are several tokens long, and nothing says how many."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Generator

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size


@dataclass(frozen=True)
class FuzzyInContextRecall(Task):
    """In-context recall where a key is 1 to 3 tokens and a value 1 to 3, of vocabularies of their own.

        tokens  _ _ k_3 k_1 v_4 k_2 v_6 v_5 v_1 k_3 k_1 v_4        target at the second k_1: v_4

    Generated: the size of a key uniform, then the key among all without a repeated token; values alike, drawn anew in
    every text and then kept. The last pair repeats one before it, and pads come first. Loss and metric: the tokens of a
    value, each at the token before it, where the key has come before. Paper: Poli et al. 2024, "Mechanistic design and
    scaling of hybrid architectures" (MAD), arXiv 2403.17844, which varies from vocabulary 16, length 128, 12,800 texts,
    trains on the next token everywhere, and tests on keys of 3 tokens only (`shortest_key` 3).

    Attributes:
        vocabulary: number of tokens: keys, values in the same number or one more, and the pad.
        shortest_key, longest_key: tokens of a key.
        longest_value: tokens of a value, which has at least 1.
    """

    paper = "Poli et al. 2024, arXiv 2403.17844"

    vocabulary: int = 16
    shortest_key: int = 1
    longest_key: int = 3
    longest_value: int = 3

    def __post_init__(self) -> None:
        for name in ("vocabulary", "shortest_key", "longest_key", "longest_value"):
            check_size(name, getattr(self, name))
        if self.shortest_key > self.longest_key:
            raise UserError(f"shortest_key = {self.shortest_key} is above longest_key = {self.longest_key}")
        for name, tokens in (("longest_key", self.num_keys), ("longest_value", self.num_values)):
            if getattr(self, name) > tokens:
                raise UserError(
                    f"{name} = {getattr(self, name)} needs as many different tokens, and vocabulary = "
                    f"{self.vocabulary} has {tokens}: change one of them"
                )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def num_keys(self) -> int:
        return (self.vocabulary - 1) // 2

    @property
    def num_values(self) -> int:
        return self.vocabulary - 1 - self.num_keys

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        shortest = 2 * (self.longest_key + self.longest_value)
        if length < shortest:
            raise UserError(f"length must be at least {shortest}, for two pairs of the longest, got {length}")
        draws = random.Random(torch.randint(2**62, (), generator=generator).item())
        tokens = torch.full((count, length), self.vocabulary - 1)
        targets = torch.full_like(tokens, IGNORE)
        for row in range(count):
            text, answers = self._text(length, draws)
            tokens[row, length - len(text) :] = torch.tensor(text)
            targets[row, length - len(text) :] = torch.tensor(answers)
        return Examples(tokens, targets)

    def _text(self, length: int, draws: random.Random) -> tuple[list[int], list[int]]:
        """Pairs of at most `length` tokens in all, and the target at each of them."""
        longest = self.longest_key + self.longest_value
        values: dict[tuple[int, ...], list[int]] = {}
        text: list[int] = []
        answers: list[int] = []
        is_last = False
        while not is_last:
            is_last = len(text) > length - 2 * longest
            if is_last:
                key = draws.choice(list(values))
            else:
                size = draws.randint(self.shortest_key, self.longest_key)
                key = tuple(draws.sample(range(self.num_keys), size))
            is_known = key in values
            if not is_known:
                drawn = draws.sample(range(self.num_values), draws.randint(1, self.longest_value))
                values[key] = [self.num_keys + token for token in drawn]
            value = values[key]
            text += [*key, *value]
            answers += [IGNORE] * (len(key) - 1) + (value if is_known else [IGNORE] * len(value)) + [IGNORE]
        return text, answers
