"""The scan over segments, forward and backward, composed from the passes, as a custom op with autograd.

Saved for the backward pass are the inputs and the state before every segment; what lies within a segment is computed
again. As a `torch.library` op it is one opaque node for `torch.compile`.
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


@torch.library.custom_op("lm_zoo::selective_scan", mutates_args=())
def segmented_forward(
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
    _check_values(dt, A, initial_state)
    dtype = compute_dtype(x.dtype)
    inputs = _prepare(dtype, x, dt, A, B, C, D, z)
    states = _initial_states(x, A, initial_state, cu_seqlens)
    borders = x.new_zeros(_border_shape(x, A, cu_seqlens) if save else 0, dtype=dtype)
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


def _initial_states(x: Tensor, A: Tensor, states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A copy of the states in the dtype of the computation, or zeros: also for their gradients."""
    dtype = compute_dtype(x.dtype)
    if states is not None:
        return states.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.new_zeros(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape, dtype=dtype)


def _border_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.shape[0], border_count(x.shape[1], sequences), A.shape[1], A.shape[0]


def _check_values(dt: Tensor, A: Tensor, initial_state: Tensor | None) -> None:
    """On a CPU; elsewhere looking at the values would stall the device."""
    if A.device.type != "cpu":
        return
    if A.max() > 0:
        raise ValueError(f"A must be <= 0, got {A.max().item():.6g}: pass -exp(A_log)")
    if dt.min() < 0:
        raise ValueError(f"dt must be >= 0, got {dt.min().item():.6g}: pass it through softplus")
    if initial_state is not None and not initial_state.isfinite().all():
        raise ValueError("initial_state must be finite, got NaN or infinity: reset the state")


@segmented_forward.register_fake
def _(x, dt, A, B, C, D, z, initial_state, cu_seqlens, save):
    states = _initial_states(x, A, initial_state, cu_seqlens)
    borders = x.new_empty(_border_shape(x, A, cu_seqlens) if save else 0, dtype=states.dtype)
    return x.new_empty(x.shape), states, borders


@torch.library.custom_op("lm_zoo::selective_scan_backward", mutates_args=())
def segmented_backward(
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
    dstates = _initial_states(x, A, dfinal_state, cu_seqlens)
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


@segmented_backward.register_fake
def _(dy, dfinal_state, x, dt, A, B, C, D, z, initial_state, cu_seqlens, borders):
    inputs = (x, dt, A, B, C, D, z, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, _):
    *inputs, cu_seqlens, borders = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    with torch.autocast(dy.device.type, enabled=False):  # it would round states to its dtype
        gradients = segmented_backward(dy, dfinal_state, *inputs, cu_seqlens, borders)
    gradients = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return *gradients, None, None


segmented_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan_segmented(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, dt, A, B, C, D, z, initial_state and cu_seqlens, as `selective_scan` has checked them."""
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return segmented_forward(*inputs, save)[:2]
