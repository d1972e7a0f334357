"""Taking back tokens that a state has read: a copy of the state where they began, and what each wrote into it.

    S_n = fold(S_0; k_1, v_1, g_1, .., k_n, v_n, g_n)

A recurrent state cannot be unwound. But it can be written again from where a few tokens began, from their keys, values
and gates alone: that costs neither projections nor a copy of the state per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lm_zoo.layers.base import LayerState


@dataclass(frozen=True)
class Call:
    """One write of some tensors of a state, by the tokens of one call: as `LayerState.record` describes it."""

    names: tuple[str, ...]
    fold: Callable[..., object]
    inputs: tuple[Tensor | None, ...]
    micro_steps: int

    @property
    def length(self) -> int:
        return self.inputs[0].shape[1] // self.micro_steps

    def again(self, state: LayerState, tokens: int, rows: Tensor | None) -> None:
        """The same write by the first `tokens` tokens, into a state that has these rows only."""

        def part(x: Tensor | None) -> Tensor | None:
            if x is None or x.dim() == 1:  # of one dimension: the same for all tokens of all rows
                return x
            x = x[:, : tokens * self.micro_steps]
            return x if rows is None else x.index_select(0, rows)

        self.fold(*(part(x) for x in self.inputs), state=state)


class Journal:
    """What has been written into a state since its `begin`."""

    def __init__(self):
        self.before: dict[str, Tensor] = {}
        self.calls: list[Call] = []

    def note(self, tensors: dict[str, Tensor], call: Call) -> None:
        for name in call.names:
            if name not in self.before:
                self.before[name] = tensors[name].detach().clone()
        self.calls.append(call)

    def check(self, state: LayerState, total: int) -> None:
        """Whether all that was written by `total` tokens is noted here."""
        lengths = dict.fromkeys(state, 0)
        for call in self.calls:
            for name in call.names:
                lengths[name] += call.length
        for name, length in lengths.items():
            if length != total:
                raise ValueError(
                    f"tokens cannot be taken back: state[{name!r}] was written without a record of what went in "
                    f"({length} of {total} tokens have one); call state.record before each write"
                )

    def replay(self, state: LayerState, tokens: int, rows: Tensor | None) -> None:
        """Write again what the first `tokens` tokens wrote into a state of these rows, `None` for all."""
        for name, tensor in self.before.items():
            state.write(name, tensor if rows is None else tensor.index_select(0, rows))
        state.recount()
        done: dict[tuple[str, ...], int] = {}
        for call in self.calls:
            start = done.get(call.names, 0)
            done[call.names] = start + call.length
            if start < tokens:
                call.again(state, min(call.length, tokens - start), rows)


@torch.no_grad()
def keep(state: LayerState, journal: Journal, counts: list[int], total: int) -> None:
    """Make `state` what it was after the first `counts[n]` of the `total` tokens of row n that `journal` tells of."""
    journal.check(state, total)
    for count in sorted({count for count in counts if count < total}):
        chosen = [row for row, own in enumerate(counts) if own == count]
        if len(chosen) == len(counts):
            journal.replay(state, count, None)
            return
        rows = torch.tensor(chosen, device=next(iter(state.tensors.values())).device)
        part = state.select(rows)
        journal.replay(part, count, rows)
        for name, tensor in part.tensors.items():
            state.writable(name).index_copy_(0, rows, tensor)
    state.recount()
