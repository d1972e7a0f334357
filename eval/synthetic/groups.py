"""The word problem of a group: the product of all elements so far, which is what it takes to follow any state."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.eval.synthetic.task import Examples, Task

GROUPS = ("S3", "S4", "A4", "S5", "A5")


@dataclass(frozen=True)
class WordProblem(Task):
    """Elements of a group, and after each of them the product of all so far.

        tokens  x_1  x_2  x_3 ...        targets  x_1  x_2 x_1  x_3 x_2 x_1 ...

    Generated: independent uniform elements of the symmetric group of n objects (S3, S4, S5) or of its even permutations
    (A4, A5), numbered in the order of their images; the identity is 0, and a product means its right factor first, as
    a state does that each element acts on. Loss: at every token. Metric: accuracy at the last token. S5 and A5 are not
    solvable, which puts them beyond what a fixed number of transformer layers computes; S3 turns and reflects a
    triangle. Papers: Merrill et al. 2024, arXiv 2404.08819; Siems et al. 2025, arXiv 2502.10297.

    Attributes:
        group: one of `GROUPS`.
    """

    paper = "Merrill et al. 2024, arXiv 2404.08819"
    metric = "last"
    group: str = "S3"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")

    @property
    def vocab_size(self) -> int:
        return len(elements(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        table = multiplication(self.group)
        tokens = torch.randint(len(table), (count, length), generator=generator)
        products = [tokens[:, 0]]
        for t in range(1, length):
            products.append(table[tokens[:, t], products[-1]])
        return Examples(tokens, torch.stack(products, dim=1))


@functools.cache
def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of a group: an object i goes to element[i]."""
    permutations = list(itertools.permutations(range(int(group[1:]))))
    return permutations if group[0] == "S" else [p for p in permutations if is_even(p)]


def is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


@functools.cache
def multiplication(group: str) -> Tensor:
    """`table[a, b]` is the number of the element that is b and then a."""
    number = {element: index for index, element in enumerate(elements(group))}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in number] for a in number])
