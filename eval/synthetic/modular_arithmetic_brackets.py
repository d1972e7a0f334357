"""Modular arithmetic with brackets: a context-free language, which no state of a fixed size follows to any depth."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Generator

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.modular_arithmetic import OPERATORS, check_expression
from lm_zoo.eval.synthetic.task import Examples, Task


@dataclass(frozen=True)
class ModularArithmeticBrackets(Task):
    """A fully bracketed expression of digits, and at its `=` the value modulo m.

        tokens  ( ( 3 + 3 ) - ( - 2 ) ) =       target at `=`: 3, for (6 + 2) mod 5

    Generated: an expression of n tokens is `d`, `-d`, `(d)` or `(-d)` for n up to 4, and else `(L op R)`, where the
    length of L is uniform and L and R are such expressions. Loss: at `=`, which ends the text. Metric: accuracy there,
    after training on 3 to 40 tokens, on 40 to 256, scaled as without brackets. Papers: Deletang et al. 2022, arXiv
    2207.02098, where the grammar is from; Grazzi et al. 2024, arXiv 2411.12537, whose vocabulary of 12 this is, and
    who report it without and with products ("+-*").

    Attributes:
        modulus: m, 5 in the papers.
        operators: which of + - * occur between brackets.
    """

    paper = "Grazzi et al. 2024, arXiv 2411.12537"
    metric = "last"

    modulus: int = 5
    operators: str = "+-"

    def __post_init__(self) -> None:
        check_expression(self.modulus, self.operators)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @property
    def alphabet(self) -> list[str]:
        """What each token is in print."""
        return [*map(str, range(self.modulus)), *OPERATORS, "=", "_", "(", ")"]

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 2:
            raise UserError(f"length must be at least 2, for a digit and the equals sign, got {length}")
        number = {character: index for index, character in enumerate(self.alphabet)}
        draws = random.Random(torch.randint(2**62, (), generator=generator).item())
        tokens = torch.empty(count, length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE)
        for row in range(count):
            text: list[str] = []
            targets[row, -1] = self._write(text, length - 1, draws)
            tokens[row] = torch.tensor([number[character] for character in [*text, "="]])
        return Examples(tokens, targets)

    def _write(self, text: list[str], length: int, draws: random.Random) -> int:
        """Append an expression of `length` tokens; its value. The depth grows with the logarithm of the length."""
        if length <= 4:
            digit = draws.randrange(self.modulus)
            minus, brackets = length % 2 == 0, length > 2
            text += ["("] * brackets + ["-"] * minus + [str(digit)] + [")"] * brackets
            return -digit % self.modulus if minus else digit
        text.append("(")
        size = draws.randint(1, length - 4)
        left = self._write(text, size, draws)
        operator = draws.choice(self.operators)
        text.append(operator)
        right = self._write(text, length - 3 - size, draws)
        text.append(")")
        value = {"+": left + right, "-": left - right, "*": left * right}[operator]
        return value % self.modulus
