"""The chunkwise form, forward and backward, composed once from the passes, as a custom op with autograd.

Saved for the backward pass are the inputs, the scores and the triangular inverse T; the states of all chunks are
recomputed. As a `torch.library` op it is one opaque node for `torch.compile`.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lm_zoo.kernels.first_call import compiles_at_once
from lm_zoo.kernels.library import op
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH

# What has the passes, by backend; imported when it is first used, as not every machine has a Triton.
PASSES = {
    "torch": "lm_zoo.kernels.linear_attention.torch_passes",
    "triton": "lm_zoo.kernels.linear_attention.triton_passes",
}


def _passes(backend: str) -> ModuleType:
    return importlib.import_module(PASSES[backend])


def _initial_states(states: Tensor | None, chunks, q: Tensor, v: Tensor) -> Tensor:
    """A copy, in the order in which `chunks` keeps them, or zeros: also for their gradients."""
    dtype = _state_dtype(q)
    if states is None:
        return q.new_zeros(_state_shape(chunks.sequences, q, v), dtype=dtype)
    return chunks.sort_states(states.to(dtype))


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _state_shape(rows: int, q: Tensor, v: Tensor) -> tuple[int, ...]:
    return rows, v.shape[2], q.shape[3], v.shape[3]


def _split(segment, heads: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else segment.split(x, heads) for x in tensors]


def _rehearse_backward(arguments: tuple, results: tuple[Tensor, ...]) -> None:
    *inputs, scale, save, decay_gradient, backend = arguments
    if save:
        chunkwise_backward(results[0], None, *inputs, *results[2:], scale, decay_gradient, backend)


@op("linear_attention")
@compiles_at_once(then=_rehearse_backward)
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
    decay_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final states, and if `save`, A_qk, A_kk and T as `[B, T, HV, C]` (empty where they do not exist).

    `decay_gradient` says what is to come: whether the backward pass will be asked for the gradient of log_decay.
    """
    passes = _passes(backend)
    heads, delta = v.shape[2], beta is not None
    chunks = passes.cut(q, v, cu_seqlens)
    state = _initial_states(initial_state, chunks, q, v)
    dtypes = passes.saved_dtypes(q, log_decay, beta) if save else [None] * 3
    o, saved = None, [None] * 3

    for segment in chunks.segments:
        qc, kc, vc, gc, bc = _split(segment, heads, q, k, v, log_decay, beta)
        G = None if gc is None else passes.cumulative_decay(gc, segment)
        A_qk, A_kk = passes.chunk_scores(qc, kc, G, scale, segment, delta=delta)
        T, u, w = None, vc, None
        if delta:
            T = passes.delta_transform(A_kk, bc, segment)
            u, w = passes.delta_apply(T, kc, vc, G, bc, segment)
        states, v_new = passes.chunk_states(kc, u, w, G, state, segment)
        o = segment.join(passes.chunk_output(qc, kc, v_new, G, A_qk, states, scale, segment), o, heads, v.dtype)
        for i, (x, dtype) in enumerate(zip((A_qk, A_kk, T), dtypes, strict=True)):
            if dtype is not None:
                saved[i] = segment.join(x, saved[i], heads, dtype)
    return o, chunks.unsort_states(state), *(q.new_empty(0) if x is None else x for x in saved)


@chunkwise_forward.register_fake
def _(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, save, decay_gradient, backend):
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtypes = _passes(backend).saved_dtypes(q, log_decay, beta) if save else [None] * 3
    shape = (*v.shape[:3], CHUNK_LENGTH)
    saved = (q.new_empty(0) if dtype is None else q.new_empty(shape, dtype=dtype) for dtype in dtypes)
    return v.new_empty(v.shape), q.new_empty(_state_shape(rows, q, v), dtype=_state_dtype(q)), *saved


@torch.library.custom_op("lm_zoo::linear_attention_backward", mutates_args=())
@compiles_at_once
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
    decay_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay, dbeta and dinitial_state (empty for an input that is `None`, and dlog_decay also unless
    `decay_gradient`)."""
    passes = _passes(backend)
    heads, delta = v.shape[2], beta is not None
    chunks = passes.cut(q, v, cu_seqlens)
    state = _initial_states(initial_state, chunks, q, v)
    dstate = _initial_states(dfinal_state, chunks, q, v)
    saved = [None if x.numel() == 0 else x for x in (A_qk, A_kk, T)]
    inputs = (q, k, v, log_decay, beta)
    gradients = [None] * len(inputs)

    recomputed = []
    for segment in chunks.segments:
        kc, vc, gc, bc, Tc = _split(segment, heads, k, v, log_decay, beta, saved[2])
        G = None if gc is None else passes.cumulative_decay(gc, segment)
        u, w = passes.delta_apply(Tc, kc, vc, G, bc, segment) if delta else (vc, None)
        recomputed.append((G, u, w, *passes.chunk_states(kc, u, w, G, state, segment)))

    for segment in reversed(chunks.segments):
        parts = _split(segment, heads, do, *inputs, *saved)
        found = _segment_backward(passes, segment, dstate, *recomputed.pop(), *parts, scale, decay_gradient)
        for i, (gradient, x) in enumerate(zip(found, inputs, strict=True)):
            if gradient is not None:
                gradients[i] = segment.join(gradient, gradients[i], x.shape[2], x.dtype)
    gradients.append(None if initial_state is None else chunks.unsort_states(dstate).to(initial_state.dtype))
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _segment_backward(
    passes, segment, dstate, G, u, w, states, v_new, do, q, k, v, log_decay, beta, A_qk, A_kk, T, scale, decay_gradient
):
    """The passes backwards over one segment: dq, dk, dv, dlog_decay and dbeta; dstate is carried back in place."""
    delta = beta is not None
    if delta:  # what a chunk writes depends on its state, so dS on dv', which becomes du
        dv = passes.chunk_output_backward(do, q, k, G, A_qk, None, scale, segment)
        dstates = passes.chunk_states_backward(do, dv, dstate, q, k, w, G, scale, segment)
    else:
        dstates = passes.chunk_states_backward(do, None, dstate, q, k, w, G, scale, segment)
        dv = passes.chunk_output_backward(do, q, k, G, A_qk, dstates, scale, segment)
    dq, dk, dw, dG, dg, dA_qk = passes.chunk_gradients(
        do, dv, q, k, v_new, G, states, dstates, scale, segment, delta=delta, decay_gradient=decay_gradient
    )
    dA_kk = dbeta = None
    if delta:
        dA_kk, dv, dbeta = passes.delta_transform_backward(dv, dw, T, u, w, k, v, G, beta, A_kk, dk, dG, segment)
    passes.chunk_scores_backward(dA_qk, dA_kk, q, k, G, A_qk, A_kk, scale, dq, dk, dG, segment)
    dg = None if dG is None else passes.cumulative_decay_backward(dG, dg, log_decay, segment)
    return dq, dk, dv, dg, dbeta


@chunkwise_backward.register_fake
def _(do, dfinal_state, q, k, v, log_decay, beta, initial_state, *others):
    *_, decay_gradient, _ = others
    inputs = (q, k, v, log_decay if decay_gradient else None, beta, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, scale, _, _, backend = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale, ctx.backend = scale, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal_state, *_):
    q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    saved = (q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T)
    decay_gradient = ctx.needs_input_grad[3]
    with torch.autocast(q.device.type, enabled=False):  # a backward pass may be started inside one
        gradients = chunkwise_backward(do, dfinal_state, *saved, ctx.scale, decay_gradient, ctx.backend)
    inputs = (q, k, v, log_decay if decay_gradient else None, beta, initial_state)
    gradients = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return *gradients, None, None, None, None, None


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
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return chunkwise_forward(*inputs, cu_seqlens, scale, any(wanted), wanted[3], backend)[:2]
