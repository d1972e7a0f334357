"""What every synthetic task is: examples out of a generator, and how answers to them are scored.

A task is a frozen dataclass of its own sizes, one file each, and one line in `TASKS`:

    task = Parity()
    examples = task.examples(count=64, length=40, generator=torch.Generator().manual_seed(0))
    task.accuracy(guesses, examples.targets)            # guesses [N, T], the likeliest token at every position
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from lm_zoo.causal_lm import IGNORE


@dataclass(frozen=True)
class Examples:
    """N texts of T tokens, and what a model is to say of them.

    Attributes:
        tokens: `[N, T]` int64.
        targets: `[N, T]` int64: `targets[n, t]` is what the model has to say once it has read `tokens[n, :t + 1]`;
            `IGNORE` where there is neither loss nor score. It is not the next token: nothing is shifted.
    """

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """Base of all tasks. A subclass defines `vocab_size`, `chance` and `examples`; its fields are its sizes.

    A subclass's docstring says what is generated, where the loss is, what is scored, and the paper.
    """

    paper: ClassVar[str]
    metric: ClassVar[str] = "tokens"
    """What a share is right of: "tokens" all targets, "last" each row's last target, "rows" rows without a mistake."""

    @property
    def vocab_size(self) -> int:
        """Tokens are in [0, vocab_size), and so are targets."""
        raise NotImplementedError(f"{type(self).__name__} does not define vocab_size")

    @property
    def chance(self) -> float:
        """The accuracy of who knows what kinds of answers there are, but has not read the text."""
        raise NotImplementedError(f"{type(self).__name__} does not define chance")

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        """`count` examples of `length` tokens each, a function of the generator's state alone.

        Raises ValueError, naming `length`, where it cannot hold what the task asks for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define examples")

    def decoder(self, hidden_size: int) -> nn.Module:
        """What stands between hidden states `[N, T, D]` and the model's head, trained with it; as a rule, nothing."""
        return nn.Identity()

    def accuracy(self, guesses: Tensor, targets: Tensor) -> float:
        """The share that is right of what `metric` names; both `[N, T]`."""
        counted = targets != IGNORE
        right = (guesses == targets) & counted
        if self.metric == "tokens":
            return (right.sum() / counted.sum()).item()
        if self.metric == "rows":
            return (right == counted).all(dim=1).float().mean().item()
        positions = torch.arange(targets.shape[1], device=targets.device)
        last = (counted * positions).argmax(dim=1, keepdim=True)
        return right.gather(1, last).float().mean().item()
