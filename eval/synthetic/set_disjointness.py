"""Set disjointness: the element that two sets share, where the order of the sets decides how much must be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.mqar import distinct
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size

PUBLISHED = ((4, 16), (16, 4), (8, 32), (32, 8), (64, 16), (16, 64), (4, 128), (128, 4), (16, 256), (256, 16))
PUBLISHED += ((4, 256), (256, 4))


@dataclass(frozen=True)
class SetDisjointness(Task):
    """Two sets that share one element, and at the end which.

        tokens  [start] a_1 ... a_n [then] b_1 ... b_m [which]      target at [which]: the element in both

    A model that reads once has to keep all of the first set; if the short set comes first that is little, and a model
    that reads twice, or not causally, may pick the order. Generated: A of n and B of m distinct tokens in random order;
    one of B, at a random place, is then replaced by one of A. Loss and metric: the answer, at the last token. Paper:
    Arora et al. 2024, "Just read twice", arXiv 2407.05483, appendix B.1, whose sizes and vocabulary are the defaults.
    There the other elements of B come from a half of the vocabulary that A has no part in, so that the answer is the
    only token of A's half after [then], and nothing of A needs to be kept: `same_half` closes this way around.

    Attributes:
        vocabulary: number of tokens for elements, an even number; the first half is A's.
        sizes: (n, m) that occur. A length takes those of n + m + 3 tokens, each as often.
        same_half: B is drawn from A's half as well, outside A.
    """

    paper = "Arora et al. 2024, arXiv 2407.05483"
    metric = "last"

    vocabulary: int = 2048
    sizes: tuple[tuple[int, int], ...] = PUBLISHED
    same_half: bool = False

    def __post_init__(self) -> None:
        check_size("vocabulary", self.vocabulary)
        if self.vocabulary % 2:
            raise UserError(f"vocabulary must be even, for a half of each set, got {self.vocabulary}")
        if not self.sizes or any(len(pair) != 2 for pair in self.sizes):
            raise UserError(f"sizes must be pairs (size of A, size of B), got {self.sizes}")
        object.__setattr__(self, "sizes", tuple((first, second) for first, second in self.sizes))
        for first, second in self.sizes:
            check_size("sizes", first)
            check_size("sizes", second)
            needed = first + second if self.same_half else max(first, second)
            if needed > self.vocabulary // 2:
                raise UserError(
                    f"sizes = ({first}, {second}) need {needed} tokens in half of vocabulary = {self.vocabulary}: "
                    "change one of them"
                )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary + 3

    @property
    def chance(self) -> float:
        return 2 / self.vocabulary

    @property
    def lengths(self) -> list[int]:
        """The lengths that `sizes` make."""
        return sorted({first + second + 3 for first, second in self.sizes})

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        sizes = [pair for pair in self.sizes if sum(pair) + 3 == length]
        if not sizes:
            raise UserError(f"length must be one that sizes make, of {self.lengths}, got {length}")
        start, then, which = range(self.vocabulary, self.vocabulary + 3)
        tokens = torch.empty(count, length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE)
        drawn = torch.randint(len(sizes), (count,), generator=generator)
        for number, (first, second) in enumerate(sizes):
            rows = (drawn == number).nonzero().squeeze(1)
            a, b, shared = self._sets(len(rows), first, second, generator)
            mark = torch.ones(len(rows), 1, dtype=torch.int64)
            tokens[rows] = torch.cat([start * mark, a, then * mark, b, which * mark], dim=1)
            targets[rows, -1] = shared
        return Examples(tokens, targets)

    def _sets(self, count: int, first: int, second: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A `[N, first]`, B `[N, second]`, and the element of both `[N]`."""
        half = self.vocabulary // 2
        if self.same_half:
            a, b = distinct(count, half, first + second, generator).split([first, second], dim=1)
        else:
            a, b = distinct(count, half, first, generator), half + distinct(count, half, second, generator)
        shared = a.gather(1, torch.randint(first, (count, 1), generator=generator))
        place = torch.randint(second, (count, 1), generator=generator)
        return a, b.scatter(1, place, shared), shared.squeeze(1)
