"""The chunkwise form, forward and backward, composed once from the passes, as a custom op with autograd.

Saved for the backward pass are the inputs, the scores and the triangular inverse T; the states of all chunks are
recomputed. As a `torch.library` op it is one opaque node for `torch.compile`.
"""

from types import ModuleType

import torch
from torch import Tensor

from lm_zoo.kernels.linear_attention import torch_passes
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH, Chunks

BACKENDS: dict[str, ModuleType] = {"torch": torch_passes}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates, cumulative sums, states and, in the PyTorch passes, products."""
    return torch.promote_types(dtype, torch.float32)


def _split_inputs(chunks: Chunks, dtype: torch.dtype, q, k, v, log_decay, beta):
    """All inputs as chunks; q and k repeated for the value heads that share them."""
    groups = v.shape[2] // q.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    return [None if x is None else chunks.split(x, dtype) for x in (q, k, v, log_decay, beta)]


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
    chunks = Chunks(*q.shape[:2], cu_seqlens)
    qc, kc, vc, gc, bc = _split_inputs(chunks, dtype, q, k, v, log_decay, beta)
    state = None if initial_state is None else initial_state.to(dtype)

    G = None if gc is None else passes.cumulative_decay(gc)
    A_qk, A_kk = passes.chunk_scores(qc, kc, G, scale, delta=beta is not None)
    T, u, w = None, vc, None
    if beta is not None:
        T = passes.delta_transform(A_kk, bc)
        u, w = passes.delta_apply(T, kc, vc, G, bc)
    states, v_new, final_state = passes.chunk_states(kc, u, w, G, state, chunks)
    o = passes.chunk_output(qc, v_new, G, A_qk, states, scale)

    saved = [q.new_empty(0, dtype=dtype) if x is None or not save else chunks.join(x, dtype) for x in (A_qk, A_kk, T)]
    return chunks.join(o, v.dtype), final_state, *saved


@chunkwise_forward.register_fake
def _(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, save, backend):
    dtype = compute_dtype(q.dtype)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty(rows, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    scores = (*v.shape[:3], CHUNK_LENGTH)
    saved = [
        q.new_empty(scores if save and exists else (0,), dtype=dtype) for exists in (True, *[beta is not None] * 2)
    ]
    return v.new_empty(v.shape), final_state, *saved


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
    chunks = Chunks(*q.shape[:2], cu_seqlens)
    qc, kc, vc, gc, bc = _split_inputs(chunks, dtype, q, k, v, log_decay, beta)
    doc, A_qk = chunks.split(do, dtype), chunks.split(A_qk, dtype)
    state = None if initial_state is None else initial_state.to(dtype)

    G = None if gc is None else passes.cumulative_decay(gc)
    u, w, A_kk, dA_kk, dbeta = vc, None, None if beta is None else chunks.split(A_kk, dtype), None, None
    if beta is not None:
        T = chunks.split(T, dtype)
        u, w = passes.delta_apply(T, kc, vc, G, bc)
    states, v_new, _ = passes.chunk_states(kc, u, w, G, state, chunks)

    dA_qk, dv, dstates, dq, dG = passes.chunk_output_backward(doc, qc, v_new, G, A_qk, states, scale)
    dk, dv, dw, dstate, dg = passes.chunk_states_backward(dv, dstates, dfinal_state, kc, v_new, w, G, states, chunks)
    if beta is not None:
        dA_kk, dv, dbeta = passes.delta_transform_backward(dv, dw, T, u, w, kc, vc, G, bc, A_kk, dk, dG)
    passes.chunk_scores_backward(dA_qk, dA_kk, qc, kc, G, A_qk, A_kk, scale, dq, dk, dG)
    dg = None if G is None else passes.cumulative_decay_backward(dG, dg, gc)

    dq, dk = (_sum_groups(chunks.join(x, dtype), q) for x in (dq, dk))
    empty = q.new_empty(0)
    return (
        dq,
        dk,
        chunks.join(dv, v.dtype),
        empty if dg is None else chunks.join(dg, log_decay.dtype),
        empty.clone() if dbeta is None else chunks.join(dbeta, beta.dtype),
        empty.clone() if initial_state is None else dstate.to(initial_state.dtype),
    )


def _sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """Adds up what the value heads of a group send back to the q or k head that they share."""
    groups = gradient.shape[2] // like.shape[2]
    gradient = gradient if groups == 1 else gradient.unflatten(2, (-1, groups)).sum(3)
    return gradient.to(like.dtype)


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
    gradients = chunkwise_backward(
        do, dfinal_state, q, k, v, log_decay, beta, initial_state, cu_seqlens, A_qk, A_kk, T, ctx.scale, ctx.backend
    )
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
