"""How time is cut into chunks, for a batch of equal sequences and for packed ones alike.

The PyTorch passes see a tensor `[B, T, H, D]` as chunks `[M, H, C, D]`, M chunks in all, the tail of each sequence
filled with zeros: a zero key writes nothing and a zero log decay keeps the state, so padding changes no state. The
chunks stand in order of time (first the first chunk of every sequence, then every second one, ...) and longer sequences
come first, so that the chunks that run in one step of the recurrence are one contiguous slice.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds

CHUNK_LENGTH = 64


class Chunks:
    """The cut of one call. `count` is M, `steps` a list of (rows, active): the slice of chunks of each step of the
    recurrence and how many of the sequences, longest first, still run."""

    def __init__(self, batch: int, length: int, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length = batch, length
        if cu_seqlens is None:
            per_sequence = -(-length // CHUNK_LENGTH)
            active = [batch] * per_sequence
            self.sequences = batch
            self.order = self.index = None
        else:
            active = self._cut_packed(cu_seqlens)
            self.sequences = cu_seqlens.numel() - 1
        self.count = sum(active)
        self.steps: list[tuple[slice, int]] = []
        start = 0
        for running in active:
            self.steps.append((slice(start, start + running), running))
            start += running

    def _cut_packed(self, cu_seqlens: Tensor) -> list[int]:
        check_bounds(cu_seqlens.tolist(), self.length)
        bounds = cu_seqlens.long()
        counts = (bounds.diff() + CHUNK_LENGTH - 1) // CHUNK_LENGTH
        self.order = counts.argsort(descending=True, stable=True)
        counts, starts, ends = counts[self.order], bounds[:-1][self.order], bounds[1:][self.order]
        step = torch.arange(int(counts[0]), device=bounds.device)
        running = step[:, None] < counts
        step, sequence = running.nonzero(as_tuple=True)
        first = starts[sequence] + step * CHUNK_LENGTH
        self.index = first[:, None] + torch.arange(CHUNK_LENGTH, device=bounds.device)  # [M, C], token of each place
        self.valid = self.index < ends[sequence][:, None]
        self.index.clamp_(max=self.length - 1)
        return running.sum(1).tolist()

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, ...]` to `[M, H, C, ...]`, contiguous, in `dtype`."""
        if self.index is not None:
            rows = x[0, self.index].to(dtype) * self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2))
            return rows.transpose(1, 2).contiguous()
        if self.length % CHUNK_LENGTH:
            padding = [0, 0] * (x.dim() - 2) + [0, -self.length % CHUNK_LENGTH]
            x = torch.nn.functional.pad(x, padding)
        x = x.unflatten(1, (-1, CHUNK_LENGTH)).transpose(0, 1).transpose(2, 3)  # [steps, B, H, C, ...]
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 1)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[M, H, C, ...]` back to `[B, T, H, ...]`, the inverse of `split`."""
        if self.index is not None:
            out = x.new_empty(1, self.length, x.shape[1], *x.shape[3:], dtype=dtype)
            out[0, self.index[self.valid]] = x.transpose(1, 2)[self.valid].to(dtype)
            return out
        x = x.unflatten(0, (-1, self.batch)).transpose(2, 3).transpose(0, 1)  # [B, steps, C, H, ...]
        if self.length % CHUNK_LENGTH == 0:
            return x.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(1, 2)
        return x.flatten(1, 2)[:, : self.length].to(dtype).contiguous()

    def sort_states(self, states: Tensor) -> Tensor:
        """One state per sequence, from the caller's order to that of `steps`; always a copy."""
        return states.clone() if self.order is None else states[self.order]

    def unsort_states(self, states: Tensor) -> Tensor:
        if self.order is None:
            return states
        out = torch.empty_like(states)
        out[self.order] = states
        return out
