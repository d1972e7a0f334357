"""How time is cut into chunks for the PyTorch passes, for a batch of equal sequences and for packed ones alike.

The passes see a tensor `[B, T, H, D]` as chunks `[M, H, C, D]`, the tail of each sequence filled with zeros: a
zero key writes nothing and a zero log decay keeps the state, so padding changes no state. Chunks stand in order of
time (the first chunk of every sequence, then every second one, ...) and longer sequences come first, so the chunks that
run in one step of the recurrence are contiguous, and so are the states of the sequences that still run.

Steps are worked through in segments, small enough that the tensors of one segment stay in a CPU's cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds

CHUNK_LENGTH = 64
# Elements of one tensor of a segment: 1 MiB in float32, measured best on a CPU with 1 MiB of second-level cache a core.
SEGMENT_ELEMENTS = 2**18


@dataclass
class Segment:
    """Some consecutive steps of `[batch, length]` tokens. `steps` is the number of sequences that run in each of them,
    never increasing; `dtype` is that of the computation.

    The tokens are `start` to `stop` of every sequence of a batch, or, packed, those that `index` names: `[M, C]`, with
    `valid` false at padding.
    """

    batch: int
    length: int
    dtype: torch.dtype
    steps: list[int]
    start: int = 0
    stop: int = 0
    index: Tensor | None = None
    valid: Tensor | None = None

    def split(self, x: Tensor, heads: int) -> Tensor:
        """`[B, T, H, ...]` to `[M, heads, C, ...]`, each head repeated for the value heads that share it."""
        chunks = self._split(x)
        groups = heads // x.shape[2]
        return chunks.repeat_interleave(groups, dim=1) if groups > 1 else chunks

    def _split(self, x: Tensor) -> Tensor:
        """Contiguous, in the dtype of the computation."""
        if self.index is not None:
            padding = ~self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2))
            rows = x[0, self.index].to(self.dtype).masked_fill(padding, 0)  # a product with 0 would make NaN of -inf
            return rows.transpose(1, 2).contiguous()
        x = x[:, self.start : self.stop]
        if x.shape[1] % CHUNK_LENGTH:
            x = torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, -x.shape[1] % CHUNK_LENGTH])
        x = x.unflatten(1, (-1, CHUNK_LENGTH)).transpose(0, 1).transpose(2, 3)  # [steps, B, H, C, ...]
        return x.to(self.dtype).contiguous().flatten(0, 1)

    def join(self, x: Tensor, out: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
        """Writes `[M, H, C, ...]` to its tokens in `out` `[B, T, heads, ...]`, a new tensor if there is none yet.

        The inverse of `split`; what the value heads of a group send to the head that they share is added up.
        """
        if x.shape[1] != heads:
            x = x.unflatten(1, (heads, -1)).sum(2)
        if out is None:
            out = x.new_empty(self.batch, self.length, heads, *x.shape[3:], dtype=dtype)
        if self.index is not None:
            out[0, self.index[self.valid]] = x.transpose(1, 2)[self.valid].to(dtype)
            return out
        x = x.unflatten(0, (-1, self.batch)).transpose(2, 3).transpose(0, 1)  # [B, steps, C, H, ...]
        tokens = out[:, self.start : self.stop]
        if tokens.shape[1] % CHUNK_LENGTH:
            tokens.copy_(x.flatten(1, 2)[:, : tokens.shape[1]])
        else:
            tokens.unflatten(1, (-1, CHUNK_LENGTH)).copy_(x)
        return out


class Chunks:
    """The cut of one call into `segments`, and the order in which the states of its sequences are kept meanwhile."""

    def __init__(
        self, batch: int, length: int, cu_seqlens: Tensor | None, dtype: torch.dtype, chunks_per_segment: int
    ) -> None:
        tokens = (batch, length, dtype)
        self.order: Tensor | None = None
        if cu_seqlens is None:
            steps = max(1, chunks_per_segment // batch)
            stride = steps * CHUNK_LENGTH
            self.sequences = batch
            self.segments = []
            for start in range(0, length, stride):
                stop = min(start + stride, length)
                in_segment = [batch] * -(-(stop - start) // CHUNK_LENGTH)
                self.segments.append(Segment(*tokens, in_segment, start, stop))
        else:
            self.sequences = cu_seqlens.numel() - 1
            self.segments = self._cut_packed(tokens, cu_seqlens, chunks_per_segment)

    def _cut_packed(self, tokens: tuple, cu_seqlens: Tensor, chunks_per_segment: int) -> list[Segment]:
        length = tokens[1]
        check_bounds(cu_seqlens.tolist(), length)
        bounds = cu_seqlens.long()
        counts = (bounds.diff() + CHUNK_LENGTH - 1) // CHUNK_LENGTH
        self.order = counts.argsort(descending=True, stable=True)
        counts, starts, ends = counts[self.order], bounds[:-1][self.order], bounds[1:][self.order]
        runs = torch.arange(int(counts[0]), device=bounds.device)[:, None] < counts  # [steps, N]
        step, sequence = runs.nonzero(as_tuple=True)
        index = (starts[sequence] + step * CHUNK_LENGTH)[:, None] + torch.arange(CHUNK_LENGTH, device=bounds.device)
        valid = index < ends[sequence][:, None]
        index.clamp_(max=length - 1)

        segments, steps, row = [], [], 0
        active = runs.sum(1).tolist()
        for i, running in enumerate(active):
            steps.append(running)
            rows = sum(steps)
            if i + 1 == len(active) or rows + active[i + 1] > chunks_per_segment:
                segments.append(Segment(*tokens, steps, index=index[row : row + rows], valid=valid[row : row + rows]))
                steps, row = [], row + rows
        return segments

    def sort_states(self, states: Tensor) -> Tensor:
        """One state per sequence, from the caller's order to that of the segments; always a copy."""
        return states.clone() if self.order is None else states[self.order]

    def unsort_states(self, states: Tensor) -> Tensor:
        """The inverse of `sort_states`."""
        if self.order is None:
            return states
        out = torch.empty_like(states)
        out[self.order] = states
        return out
