"""How a call is cut, so that no tensor of a state per token is ever whole: into runs, and runs into segments.

A run is a block of rows and channels over the time of one sequence, so few that stepping over their states stays in a
CPU's first caches; a segment is a few tokens of it. Time comes first in all of this, because steps are taken along it,
and channels come last, because whatever is done per state runs along them: S tokens, R rows, W channels.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds

# Tokens. The state before each segment is saved for the backward pass: N / 32 times as much as x.
SEGMENT_LENGTH = 32
# Elements of the states of a run at one token, 32 KiB in float32: then the states of a segment are 1 MiB.
BLOCK_ELEMENTS = 2**13
MIN_CHANNELS = 64  # of a run: below, the loops along the channels would be too short to pay


class Inputs(NamedTuple):
    """The inputs of a call, or of a segment of it, or their gradients, or where in them a segment is."""

    x: Tensor  # [T, B, D], of a segment [S, R, W]
    dt: Tensor  # as x
    A: Tensor  # [N, D], of a segment [N, W]
    B: Tensor  # [T, B, N], of a segment [S, R, N]
    C: Tensor  # as B
    D: Tensor | None  # [D], of a segment [W]
    z: Tensor | None  # as x

    @classmethod
    def of(cls, x, dt, A, B, C, D, z) -> "Inputs":
        """From the layout of the public function, or back to it."""
        time_first = (None if tensor is None else tensor.transpose(0, 1) for tensor in (x, dt, A, B, C))
        return cls(*time_first, D, None if z is None else z.transpose(0, 1))


class Buffer(NamedTuple):
    """Room for something per state and token, reused by all segments of a run."""

    values: Tensor  # [S, R, N, W]
    steps: tuple[Tensor, ...]  # views of the tokens, made once: to make them costs about as much as a step

    def first(self, tokens: int) -> "Buffer":
        return Buffer(self.values[:tokens], self.steps[:tokens])


@dataclass
class Segment:
    tokens: slice
    border: int  # where the state before it is saved


@dataclass
class Run:
    rows: slice  # of x
    states: slice  # of the initial and final states: the rows, or the packed sequence
    channels: slice
    segments: list[Segment]

    def where(self, segment: Segment) -> Inputs:
        channels = (segment.tokens, self.rows, self.channels)
        shared = (segment.tokens, self.rows)
        return Inputs(channels, channels, (slice(None), self.channels), shared, shared, self.channels, channels)

    def cut_states(self, states: Tensor) -> Tensor:
        """`[B or sequences, D, N]` to `[R, N, W]`; always a copy."""
        return states[self.states, self.channels].mT.clone(memory_format=torch.contiguous_format)

    def paste_states(self, state: Tensor, states: Tensor) -> None:
        """The inverse of `cut_states`."""
        states[self.states, self.channels] = state.mT

    def buffers(self, count: int, states: Tensor) -> list[Buffer]:
        """For segments; in the dtype of the states `[B or sequences, D, N]`."""
        shape = (SEGMENT_LENGTH, _size(self.rows), states.shape[2], _size(self.channels))
        return [Buffer(values, values.unbind(0)) for values in (states.new_empty(shape) for _ in range(count))]


def border_count(length: int, sequences: int) -> int:
    """At least as many as a row has segments, without a look at the contents of `cu_seqlens`."""
    return length // SEGMENT_LENGTH + sequences


def cut_runs(x: Tensor, state_size: int, cu_seqlens: Tensor | None) -> list[Run]:
    batch, length, channels = x.shape
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else sys.maxsize
    channel_blocks = list(_blocks(channels, max(MIN_CHANNELS, elements // state_size)))
    if cu_seqlens is None:
        segments = _segments(0, length, 0)
        per_row = state_size * _size(channel_blocks[0])
        spans = [(rows, rows, segments) for rows in _blocks(batch, max(1, elements // per_row))]
    else:
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, length)
        spans, border = [], 0
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            segments = _segments(start, end, border)
            spans.append((slice(0, 1), slice(n, n + 1), segments))
            border += len(segments)
    return [Run(rows, states, block, segments) for rows, states, segments in spans for block in channel_blocks]


def _segments(start: int, stop: int, border: int) -> list[Segment]:
    starts = range(start, stop, SEGMENT_LENGTH)
    return [Segment(slice(t, min(t + SEGMENT_LENGTH, stop)), border + i) for i, t in enumerate(starts)]


def _blocks(size: int, limit: int) -> Iterator[slice]:
    """Blocks of about the same size, at most `limit`."""
    count = -(-size // limit)
    width = -(-size // count)
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def _size(block: slice) -> int:
    return block.stop - block.start
