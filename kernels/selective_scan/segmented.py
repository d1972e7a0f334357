"""The scan over segments in PyTorch, forward and backward, composed from the passes. `op.py` registers it.

Saved for the backward pass are the inputs and the state before every segment; what lies within a segment is computed
again.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.selective_scan.runs import Inputs, border_count, cut_runs
from lm_zoo.kernels.selective_scan.torch_passes import segment_backward, segment_forward

WRITTEN_ONCE = ("x", "dt", "z")  # the gradients that only one segment adds to


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _prepare(dtype: torch.dtype, *arguments: Tensor | None) -> Inputs:
    """Time first; what all segments share already in the dtype of the computation."""
    inputs = Inputs.of(*arguments)
    D = None if inputs.D is None else inputs.D.to(dtype)
    return inputs._replace(A=inputs.A.to(dtype).contiguous(), D=D)


def _cut(inputs: Inputs, where: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(None if x is None else x[index].to(dtype) for x, index in zip(inputs, where, strict=True)))


def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final states and, if `save`, the states before the segments `[B, segments, N, D]`, else empty."""
    dtype = compute_dtype(x.dtype)
    inputs = _prepare(dtype, x, dt, A, B, C, D, z)
    states = initial_states(x, A, initial_state, cu_seqlens)
    borders = x.new_zeros(border_shape(x, A, cu_seqlens) if save else 0, dtype=dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y_time_first = y.transpose(0, 1)
    for run in cut_runs(x, A.shape[1], cu_seqlens):
        state = run.cut_states(states)
        buffers = run.buffers(2, states)
        for segment in run.segments:
            if save:
                borders[run.rows, segment.border, :, run.channels] = state
            where = run.where(segment)
            part = _cut(inputs, where, dtype)
            y_time_first[where.x] = segment_forward(part, state, *(buffer.first(len(part.x)) for buffer in buffers))
        run.paste_states(state, states)
    return y, states, borders


def initial_states(x: Tensor, A: Tensor, states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A copy of the states in the dtype of the computation, or zeros: also for their gradients."""
    dtype = compute_dtype(x.dtype)
    if states is not None:
        return states.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.new_zeros(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape, dtype=dtype)


def border_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.shape[0], border_count(x.shape[1], sequences), A.shape[1], A.shape[0]


def selective_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D, z and the initial state (empty for an input that is `None`)."""
    dtype = compute_dtype(x.dtype)
    arguments = (x, dt, A, B, C, D, z)
    inputs = _prepare(dtype, *arguments)
    totals = Inputs.of(*(None if t is None else t.new_empty(t.shape, dtype=dtype) for t in arguments))
    for name, total in totals._asdict().items():
        if name not in WRITTEN_ONCE and total is not None:
            total.zero_()
    dstates = initial_states(x, A, dfinal_state, cu_seqlens)
    dy = dy.transpose(0, 1)
    for run in cut_runs(x, A.shape[1], cu_seqlens):
        dstate = run.cut_states(dstates)
        buffers = run.buffers(3, dstates)
        for segment in reversed(run.segments):
            where = run.where(segment)
            part = _cut(inputs, where, dtype)
            state = borders[run.rows, segment.border, :, run.channels]
            room = (buffer.first(len(part.x)) for buffer in buffers)
            found = segment_backward(dy[where.x].to(dtype), dstate, part, state, *room)
            for name, total, gradient, index in zip(Inputs._fields, totals, found, where, strict=True):
                if name in WRITTEN_ONCE and gradient is not None:
                    total[index] = gradient
                elif gradient is not None:
                    total[index] += gradient
        run.paste_states(dstate, dstates)
    pairs = zip((*arguments, initial_state), (*Inputs.of(*totals), dstates), strict=True)
    return tuple(x.new_empty(0) if t is None else gradient.to(t.dtype) for t, gradient in pairs)
