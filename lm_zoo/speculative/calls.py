"""Calls whose tokens can be taken back, over and over: on a CPU they are recorded and replayed without their Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.decode import recordable
from lm_zoo.layers import LayerState
from lm_zoo.layers.journal import Call
from lm_zoo.tape import Tape

WARM_UP = 2  # plain calls of a kind before it is recorded


@dataclass(frozen=True)
class Recording:
    """A call, and what it noted of each state: tensors of the tapes, which every replay fills anew."""

    runs: list[Callable[[Tensor], Tensor]]
    notes: list[tuple[dict[str, Tensor], list[Call]] | None]


class Calls:
    """Calls of a model with one cache that records.

        calls = Calls(model, cache)
        calls.record()
        logits = calls(ids)                 # [B, T] -> [B, T, V]; overwritten by the next such call
        logits = calls(ids)                 # any number of calls
        calls.keep([1])                     # as ZooCache.keep; recorded, too

    What a replayed call notes lies where it lay the last time. So the first, second, .. call after `record()` are calls
    of different kinds, each with its own recording, and so are calls of other lengths.
    """

    def __init__(self, model: CausalLM, cache: ZooCache):
        self.model, self.cache = model, cache
        self.replays = model.device.type == "cpu" and recordable(model, cache)
        self._plain: Counter[tuple[int, int]] = Counter()
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._block: list[tuple[int, int] | None] = []  # the kinds of the calls since record(), None of plain ones
        self._keeps: dict[tuple, Tape] = {}
        self._nothing = torch.zeros(1)

    def record(self) -> None:
        self.cache.record()
        self._block = []

    def keep(self, counts: list[int]) -> None:
        alike = len(set(counts)) == 1 and counts[0] < self.cache.read_since_record
        self.cache.keep(counts, self._write if alike and self.replays and None not in self._block else None)
        self._block = []

    def _write(self, counts: list[int], total: int) -> None:
        noted = [state for state in self.cache.states if state.journal is not None]
        for state in self.cache.states:
            if state.journal is None:
                state.keep(counts, total)
        kind = *self._block, counts[0]
        with torch.inference_mode():
            if kind in self._keeps:
                self._keeps[kind](self._nothing)
                return
            tape = Tape(partial(_keep, noted, counts, total), self._nothing)
        if tape.refusal is None:
            self._keeps[kind] = tape

    def __call__(self, ids: Tensor) -> Tensor:
        kind = len(self._block), ids.shape[1]
        if not self.replays or self._plain[kind] < WARM_UP:
            self._plain[kind] += 1
            self._block.append(None)
            return self.model(ids, past_key_values=self.cache).logits
        self._block.append(kind)
        length = self.cache.length
        with torch.inference_mode():
            recording = self._recordings.get(kind)
            logits = self._record(kind, ids) if recording is None else self._replay(recording, ids)
        self.cache.length = length + ids.shape[1]
        return logits

    def _record(self, kind: tuple[int, int], x: Tensor) -> Tensor:
        states = self.cache.states
        earlier = [None if s.journal is None else (set(s.journal.before), len(s.journal.calls)) for s in states]
        runs = []
        for fixed, group in groupby(self.model.decode_parts(self.cache), key=lambda part: part[0]):
            run = partial(_in_turn, [part for _, part in group])
            if fixed:
                run = Tape(run, x)
                x = run.output
                self.replays = self.replays and run.refusal is None
            else:
                x = run(x)
            runs.append(run)
        notes = []
        for state, known in zip(states, earlier, strict=True):
            if known is None:  # that of a layer which notes nothing and is not recorded
                notes.append(None)
                continue
            before = {name: tensor for name, tensor in state.journal.before.items() if name not in known[0]}
            notes.append((before, state.journal.calls[known[1] :]))
        self._recordings[kind] = Recording(runs, notes)
        return x

    def _replay(self, recording: Recording, x: Tensor) -> Tensor:
        for run in recording.runs:
            x = run(x)
        for state, note in zip(self.cache.states, recording.notes, strict=True):
            if note is not None:
                state.journal.before.update(note[0])
                state.journal.calls += note[1]
        return x


def _keep(states: list[LayerState], counts: list[int], total: int, x: Tensor) -> Tensor:
    for state in states:
        state.keep(counts, total)
    return x


def _in_turn(parts: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x
