"""Modular arithmetic without brackets: the value of a sum of products modulo m, a regular language."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size

OPERATORS = "+-*"


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """An expression of digits, and at its `=` the value modulo m, products before sums.

        tokens  2 - 3 - 3 * 2 =         target at `=`: 3, for (2 - 3 - 6) mod 5

    Generated: digits and operators, each uniform. An expression has an odd number of tokens, so that a text of odd
    length ends with one pad. Loss: at `=`. Metric: accuracy there, after training on short texts, on longer ones; the
    paper trains on 3 to 40 tokens, tests on 40 to 256 and prints (accuracy - chance) / (1 - chance). Papers: Deletang
    et al. 2022, arXiv 2207.02098; Grazzi et al. 2024, arXiv 2411.12537, whose vocabulary of 10 this is.

    Attributes:
        modulus: m, 5 in the papers.
        operators: which of + - * occur.
        supervised: "result" as in the papers, or "values": a target at each digit as well, the value of the expression
            so far. One text then teaches all its beginnings, as in parity; the score is the same.
    """

    paper = "Grazzi et al. 2024, arXiv 2411.12537"
    metric = "last"

    modulus: int = 5
    operators: str = OPERATORS
    supervised: str = "result"

    def __post_init__(self) -> None:
        check_expression(self.modulus, self.operators)
        if self.supervised not in ("result", "values"):
            raise UserError(f"supervised must be 'result' or 'values', got {self.supervised!r}")

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @property
    def alphabet(self) -> list[str]:
        """What each token is in print."""
        return [*map(str, range(self.modulus)), *OPERATORS, "=", "_"]

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 2:
            raise UserError(f"length must be at least 2, for a digit and the equals sign, got {length}")
        digits = torch.randint(self.modulus, (count, length // 2), generator=generator)
        kinds = torch.tensor([OPERATORS.index(operator) for operator in self.operators])
        signs = kinds[torch.randint(len(kinds), (count, length // 2 - 1), generator=generator)]
        values = _values(digits, signs, self.modulus)
        end = 2 * (length // 2) - 1  # where the equals sign stands
        tokens = torch.full((count, length), self.alphabet.index("_"))
        tokens[:, :end:2] = digits
        tokens[:, 1:end:2] = signs + self.modulus
        tokens[:, end] = self.alphabet.index("=")
        targets = torch.full_like(tokens, IGNORE)
        targets[:, end] = values[:, -1]
        if self.supervised == "values":
            targets[:, :end:2] = values
        return Examples(tokens, targets)


def check_expression(modulus: int, operators: str) -> None:
    check_size("modulus", modulus)
    if modulus < 2:
        raise UserError(f"modulus must be at least 2, got {modulus}")
    if not operators or set(operators) - set(OPERATORS) or len(set(operators)) < len(operators):
        raise UserError(f"operators must be some of {OPERATORS}, each once, got {operators!r}")


def _values(digits: Tensor, signs: Tensor, modulus: int) -> Tensor:
    """The value of each beginning of an expression that ends with a digit, `[N, n]`; `signs` index OPERATORS."""
    total, term = torch.zeros_like(digits[:, 0]), digits[:, 0]
    values = [term]
    for digit, sign in zip(digits[:, 1:].T, signs.T, strict=True):
        is_product = sign == OPERATORS.index("*")
        total = torch.where(is_product, total, total + term)
        term = torch.where(is_product, term * digit, torch.where(sign == OPERATORS.index("-"), -digit, digit)) % modulus
        values.append((total + term) % modulus)
    return torch.stack(values, dim=1)
