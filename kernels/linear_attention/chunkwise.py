"""The chunkwise form, forward and backward, composed once from the passes, as a custom op with autograd.

Saved for the backward pass are the inputs, the scores and the triangular inverse T; the states of all chunks are
recomputed. As a `torch.library` op it is one opaque node for `torch.compile`.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

from lm_zoo.kernels.linear_attention import torch_passes
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH, SEGMENT_ELEMENTS, Chunks, Segment

BACKENDS: dict[str, ModuleType] = {"torch": torch_passes}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates, cumulative sums, states and, in the PyTorch passes, products."""
    return torch.promote_types(dtype, torch.float32)


def _cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    per_chunk = v.shape[2] * CHUNK_LENGTH * max(q.shape[3], v.shape[3])
    chunks_per_segment = max(1, SEGMENT_ELEMENTS // per_chunk) if q.device.type == "cpu" else sys.maxsize
    return Chunks(*q.shape[:2], cu_seqlens, chunks_per_segment)


def _split_inputs(segment: Segment, dtype: torch.dtype, q, k, v, log_decay, beta):
    """The inputs of a segment as chunks; q and k repeated for the value heads that share them."""
    groups = v.shape[2] // k.shape[2]
    qc, kc, *others = (None if x is None else segment.split(x, dtype) for x in (q, k, v, log_decay, beta))
    if groups > 1:
        qc, kc = (None if x is None else x.repeat_interleave(groups, dim=1) for x in (qc, kc))
    return qc, kc, *others


def _sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """Adds up what the value heads of a group send back to the q or k head that they share."""
    groups = gradient.shape[1] // heads
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)


def _state_shape(rows: int, q: Tensor, v: Tensor) -> tuple[int, ...]:
    return rows, v.shape[2], q.shape[3], v.shape[3]


@torch.library.custom_op("lm_zoo::linear_attention", mutates_args=())
def chunkwise_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final states, and if `save`, A_qk, A_kk and T as `[B, T, HV, C]` (empty where they do not exist)."""
    passes = BACKENDS[backend]
    dtype = compute_dtype(q.dtype)
    chunks = _cut(q, v, cu_seqlens)
    if initial_state is None:
        state = q.new_zeros(_state_shape(chunks.sequences, q, v), dtype=dtype)
    else:
        state = chunks.sort_states(initial_state.to(dtype))
    o, saved = torch.empty_like(v, memory_format=torch.contiguous_format), _empty_saved(v, beta, dtype, save)

    for segment in chunks.segments:
        qc, kc, vc, gc, bc = _split_inputs(segment, dtype, q, k, v, log_decay, beta)
        G = None if gc is None else passes.cumulative_decay(gc)
        A_qk, A_kk = passes.chunk_scores(qc, kc, G, scale, delta=beta is not None)
        T, u, w = None, vc, None
        if beta is not None:
            T = passes.delta_transform(A_kk, bc)
            u, w = passes.delta_apply(T, kc, vc, G, bc)
        states, v_new = passes.chunk_states(kc, u, w, G, state, segment.steps)
        segment.join(passes.chunk_output(qc, v_new, G, A_qk, states, scale), o)
        if save:
            for x, out in zip((A_qk, A_kk, T), saved, strict=True):
                if x is not None:
                    segment.join(x, out)
    return o, chunks.unsort_states(state), *saved


def _empty_saved(v: Tensor, beta: Tensor | None, dtype: torch.dtype, save: bool) -> list[Tensor]:
    """A_qk, A_kk and T."""
    shape = (*v.shape[:3], CHUNK_LENGTH)
    exists = (True, beta is not None, beta is not None)
    return [v.new_empty(shape if save and one else (0,), dtype=dtype) for one in exists]


@chunkwise_forward.register_fake
def _(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, save, backend):
    dtype = compute_dtype(q.dtype)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), q.new_empty(_state_shape(rows, q, v), dtype=dtype), *_empty_saved(v, beta, dtype, save)


@torch.library.custom_op("lm_zoo::linear_attention_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_qk: Tensor,
    A_kk: Tensor,
    T: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay, dbeta and dinitial_state (empty for an input that is `None`)."""
    passes = BACKENDS[backend]
    dtype = compute_dtype(q.dtype)
    chunks = _cut(q, v, cu_seqlens)
    state = q.new_zeros(_state_shape(chunks.sequences, q, v), dtype=dtype)
    dstate = torch.zeros_like(state) if dfinal_state is None else chunks.sort_states(dfinal_state.to(dtype))
    if initial_state is not None:
        state = chunks.sort_states(initial_state.to(dtype))
    inputs = (q, k, v, log_decay, beta, initial_state)
    gradients = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]

    all_states = []
    for segment in chunks.segments:
        _, kc, vc, gc, bc = _split_inputs(segment, dtype, None, k, v, log_decay, beta)
        G = None if gc is None else passes.cumulative_decay(gc)
        u, w = (vc, None) if beta is None else passes.delta_apply(segment.split(T, dtype), kc, vc, G, bc)
        all_states.append(passes.chunk_states(kc, u, w, G, state, segment.steps)[0])

    for segment in reversed(chunks.segments):
        parts = _split_inputs(segment, dtype, q, k, v, log_decay, beta)
        scores = [None if x.numel() == 0 else segment.split(x, dtype) for x in (A_qk, A_kk, T)]
        found = _segment_backward(
            passes, segment.split(do, dtype), dstate, all_states.pop(), *parts, *scores, scale, segment.steps
        )
        for gradient, out, x in zip(found, gradients[:5], inputs[:5], strict=True):
            if gradient is not None:
                segment.join(_sum_groups(gradient, x.shape[2]), out)
    if initial_state is not None:
        gradients[5].copy_(chunks.unsort_states(dstate))
    return tuple(gradients)


def _segment_backward(passes, do, dstate, states, q, k, v, log_decay, beta, A_qk, A_kk, T, scale, steps):
    """The passes backwards over one segment: dq, dk, dv, dlog_decay and dbeta; dstate is carried back in place."""
    G = None if log_decay is None else passes.cumulative_decay(log_decay)
    u, w, v_new = v, None, v
    if beta is not None:
        u, w = passes.delta_apply(T, k, v, G, beta)
        v_new = passes.delta_values(u, w, states)
    dA_qk, dv, dstates, dq, dG = passes.chunk_output_backward(do, q, v_new, G, A_qk, states, scale)
    dk, dw, dg = passes.chunk_states_backward(dv, dstates, dstate, k, v_new, w, G, states, steps)
    dA_kk = dbeta = None
    if beta is not None:
        dA_kk, dv, dbeta = passes.delta_transform_backward(dv, dw, T, u, w, k, v, G, beta, A_kk, dk, dG)
    passes.chunk_scores_backward(dA_qk, dA_kk, q, k, G, A_qk, A_kk, scale, dq, dk, dG)
    dg = None if G is None else passes.cumulative_decay_backward(dG, dg, log_decay)
    return dq, dk, dv, dg, dbeta


@chunkwise_backward.register_fake
def _(do, dfinal_state, q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T, scale, backend):
    inputs = (q, k, v, log_decay, beta, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, scale, _, backend = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale, ctx.backend = scale, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal_state, *_):
    q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    saved = (q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T)
    with torch.autocast(q.device.type, enabled=False):  # a backward pass may be started inside one
        gradients = chunkwise_backward(do, dfinal_state, *saved, ctx.scale, ctx.backend)
    inputs = (q, k, v, log_decay, beta, initial_state)
    gradients = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return *gradients, None, None, None, None


chunkwise_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_attention_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Takes what `linear_attention` has checked; `log_decay` is per token or per key channel."""
    inputs = (q, k, v, log_decay, beta, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return chunkwise_forward(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, save, backend)[:2]
