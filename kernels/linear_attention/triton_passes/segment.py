"""Where the chunks of a call lie, for kernels that read tokens in place.

Tensors keep the public layout `[B, T, H, D]`, for a kernel `[B T, H, D]`: chunk m is the tokens from `start` to `end`,
at most C of them, and belongs to one sequence. For a batch of equal sequences both are arithmetic; for packed ones they
stand in a table that is computed on the device, without waiting for it. The number M of chunks is then an upper bound,
and those past the last sequence are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH
from lm_zoo.kernels.linear_attention.triton_passes.tiles import blocks

C: tl.constexpr = tl.constexpr(CHUNK_LENGTH)


@dataclass
class Segment:
    """All chunks of a call: with these passes a call is a single segment."""

    batch: int
    length: int  # T
    sequences: int  # N, or B
    chunks: int  # M
    dtype: torch.dtype  # of q, k and v, and of what is computed of them to be an operand of a product
    bounds: Tensor | None = None  # packed: [M, 2] int64, the tokens from start to end of each chunk
    first_chunk: Tensor | None = None  # packed: [N + 1] int64, the first chunk of each sequence

    @property
    def segments(self) -> list[Segment]:
        return [self]

    def split(self, x: Tensor, heads: int) -> Tensor:
        """x itself: kernels find the tokens of a chunk, and the head that value heads share, on their own."""
        return x.contiguous()

    def join(self, x: Tensor, out: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
        """x `[B, T, HV, ...]`, what the value heads of a group send to the head that they share added up."""
        if x.shape[2] != heads:
            x = x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32)
        return x.to(dtype)

    def sort_states(self, states: Tensor) -> Tensor:
        """The caller's order is kept; always a copy."""
        return states.clone(memory_format=torch.contiguous_format)

    def unsort_states(self, states: Tensor) -> Tensor:
        return states


def cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Segment:
    """How these passes want the tokens of a call."""
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        return Segment(batch, length, batch, batch * blocks(length, CHUNK_LENGTH), q.dtype)
    sequences = cu_seqlens.numel() - 1
    bounds, first_chunk = _packed_chunks(cu_seqlens, length)
    return Segment(batch, length, sequences, len(bounds), q.dtype, bounds, first_chunk)


# The layers of a model share one cu_seqlens, so few tables serve a step. An entry keeps its cu_seqlens alive, so that
# no other tensor takes its address meanwhile; its version tells whether it has been written to.
_tables: dict[tuple, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
TABLES_KEPT = 4


def _packed_chunks(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`bounds` and `first_chunk` of a `Segment`, from the cache if they are known."""
    recording = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()  # a replay may bring other borders
    if recording or cu_seqlens.is_inference():  # which has no version
        return _chunk_table(cu_seqlens, length)
    key = (cu_seqlens.data_ptr(), cu_seqlens._version, cu_seqlens.dtype, cu_seqlens.device, len(cu_seqlens), length)
    if key not in _tables:
        while len(_tables) >= TABLES_KEPT:
            _tables.pop(next(iter(_tables)))
        _tables[key] = cu_seqlens, _chunk_table(cu_seqlens, length)
    return _tables[key][1]


def _chunk_table(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    borders = cu_seqlens.long()
    sequences = len(borders) - 1
    counts = (borders.diff() + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    first_chunk = F.pad(counts.cumsum(0), (1, 0))
    chunk = torch.arange(length // CHUNK_LENGTH + sequences, device=borders.device)
    sequence = torch.searchsorted(first_chunk[1:], chunk, right=True)
    exists = sequence < sequences
    sequence = sequence.clamp(max=sequences - 1)
    start = borders[sequence] + (chunk - first_chunk[sequence]) * CHUNK_LENGTH
    end = torch.minimum(start + CHUNK_LENGTH, borders[sequence + 1])
    return torch.stack([start, end], dim=1) * exists[:, None], first_chunk


@triton.jit
def chunk_tokens(m, bounds, T):
    """Start and end of chunk m among the B T tokens; `bounds` is None for a batch of equal sequences."""
    if bounds is not None:
        start = tl.load(bounds + 2 * m)
        end = tl.load(bounds + 2 * m + 1)
    else:
        per_sequence = tl.cdiv(T, C)
        first = tl.cast(m // per_sequence, tl.int64) * T
        start = first + (m % per_sequence) * C
        end = tl.minimum(start + C, first + T)
    return start, end


@triton.jit
def sequence_chunks(n, first_chunk, T):
    """The first chunk of sequence n, and the one after its last."""
    if first_chunk is not None:
        first = tl.load(first_chunk + n)
        last = tl.load(first_chunk + n + 1)
    else:
        per_sequence = tl.cdiv(T, C)
        first = tl.cast(n, tl.int64) * per_sequence
        last = first + per_sequence
    return first, last
