"""The passes of the chunkwise form in PyTorch, on any device; quick on a CPU.

One pass per step of the form, forward and backward; `chunkwise.py` composes them, and `triton_passes/` has their twins:
same names, same signatures, same results. Tensors are cut into M chunks of C tokens (`chunks.py`): q, k
`[M, H, C, K]`, v `[M, H, C, V]`, states `[M, H, K, V]`, scores `[M, H, C, C]`. G is the cumulative log decay inside the
chunk: `None`, `[M, H, C]` (per token) or `[M, H, C, K]` (per key channel). `segment` says where the chunks lie; here
only those that carry states need it. Every exponent formed here is <= 0, but for the bounded ones of
`channel_scores.py`.

    1 cumulative_decay     G
    2 chunk_scores         A_qk[i,j] = scale sum_d q_id k_jd e^{G_id - G_jd}  i >= j,   A_kk[i,j] likewise of k, i > j
    3 delta_transform      T = (I + diag(beta) A_kk)^-1    u = T diag(beta) V    w = T diag(beta) (K e^G)
    4 chunk_states         v' = u - w S    S <- Diag(e^{G_C}) S + (K e^{G_C - G})^T v'
    5 chunk_output         O = scale (Q e^G) S + A_qk v'

Names: `dx` is the gradient of x. Backward passes that take dq, dk or dG add to them in place.
"""

import sys

import torch
from torch import Tensor

from lm_zoo.kernels.linear_attention.channel_scores import (
    SAFE_SPAN,
    channel_scores,
    channel_scores_backward,
    diagonal_blocks,
    exp_of,
)
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH, SEGMENT_ELEMENTS, Chunks, Segment

# e^-104 is 0 in float32 and e^-746 in float64: below the floor a decay forgets everything, as -inf does.
DECAY_FLOOR = {torch.float32: -104.0, torch.float64: -746.0}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates, states and products; cumulative sums are in float64."""
    return torch.promote_types(dtype, torch.float32)


def cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """How these passes want the tokens of a call."""
    per_chunk = v.shape[2] * CHUNK_LENGTH * max(q.shape[3], v.shape[3])
    chunks_per_segment = max(1, SEGMENT_ELEMENTS // per_chunk) if q.device.type == "cpu" else sys.maxsize
    return Chunks(*q.shape[:2], cu_seqlens, compute_dtype(q.dtype), chunks_per_segment)


def saved_dtypes(q: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> list[torch.dtype | None]:
    """Of A_qk, A_kk and T as the backward pass wants them; `None` for what it does without."""
    dtype, delta = compute_dtype(q.dtype), beta is not None
    return [dtype, dtype if delta else None, dtype if delta else None]


# ---- 1 cumulative_decay -------------------------------------------------------------------------------------------


def cumulative_decay(log_decay: Tensor, segment: Segment) -> Tensor:
    """In float64: a chunk may sum to thousands of nats, and it is small differences of G that matter."""
    return log_decay.clamp(min=DECAY_FLOOR[log_decay.dtype]).cumsum(2, dtype=torch.float64)


def cumulative_decay_backward(dG: Tensor, dlog_decay: Tensor, log_decay: Tensor, segment: Segment) -> Tensor:
    """dlog_decay is what reaches the decays past G (`chunk_gradients`)."""
    dlog_decay = dG.flip(2).cumsum(2).flip(2).add_(dlog_decay)
    return dlog_decay.masked_fill_(log_decay < DECAY_FLOOR[log_decay.dtype], 0.0)


# ---- 2 chunk_scores -----------------------------------------------------------------------------------------------


def chunk_scores(
    q: Tensor, k: Tensor, G: Tensor | None, scale: float, segment: Segment, *, delta: bool
) -> tuple[Tensor, Tensor | None]:
    """A_qk, and A_kk if `delta`."""
    if G is not None and G.dim() == 4:
        scores = channel_scores([q, k] if delta else [q], k, G)
        A_qk = scores[0].mul_(scale)
        A_qk.diagonal(dim1=-2, dim2=-1).copy_(torch.linalg.vecdot(q, k).mul_(scale))
        return A_qk, scores[1] if delta else None
    decay = PairwiseDecay(G, k.dtype)
    A_qk = decay.apply_(q @ k.mT, scale).tril_()
    return A_qk, decay.apply_(k @ k.mT).tril_(-1) if delta else None


def chunk_scores_backward(
    dA_qk: Tensor,
    dA_kk: Tensor | None,
    q: Tensor,
    k: Tensor,
    G: Tensor | None,
    A_qk: Tensor,
    A_kk: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dG: Tensor | None,
    segment: Segment,
) -> None:
    """Adds to dq, dk and, if there is one, dG. dA_qk, lower, and dA_kk, strictly lower triangular, are overwritten."""
    delta = dA_kk is not None
    if G is not None and G.dim() == 4:
        # The diagonal does not depend on G. Kept apart, it cannot drown what does in q*dq - k*dk.
        diagonal = dA_qk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * scale
        dq.addcmul_(diagonal, k)
        dk.addcmul_(diagonal, q)
        rows = [q, k] if delta else [q]
        dscores = [dA_qk.mul_(scale).tril_(-1)] + ([dA_kk] if delta else [])
        drows, dcolumns = channel_scores_backward(dscores, rows, k, G)
        for dx, total in zip(drows, (dq, dk), strict=False):
            total.add_(dx)
        dk.add_(dcolumns)
        if dG is not None:
            for x, dx in zip(rows, drows, strict=True):
                dG.addcmul_(x, dx)
            dG.addcmul_(k, dcolumns, value=-1)
        return
    if dG is not None:
        weight = dA_qk * A_qk
        if delta:
            weight.addcmul_(dA_kk, A_kk)
        weight.tril_(-1)
        dG.add_(weight.sum(-1, dtype=torch.float64)).sub_(weight.sum(-2, dtype=torch.float64))
    decay = PairwiseDecay(G, k.dtype)
    dscores = decay.apply_(dA_qk, scale).tril_()
    _add_product(dq, dscores, k)
    _add_product(dk, dscores.mT, q)
    if delta:
        dscores = decay.apply_(dA_kk).tril_(-1)
        _add_product(dk, dscores, k)
        _add_product(dk, dscores.mT, k)


class PairwiseDecay:
    """Multiplies scores by e^{G_i - G_j}, the same for all channels; what is above the diagonal is left undefined.

    As e^{G_i - G_r} e^{G_r - G_j} with the middle row r where the decay across a chunk allows it (`channel_scores.py`),
    which spares C^2 exponentials a chunk.
    """

    def __init__(self, G: Tensor | None, dtype: torch.dtype) -> None:
        self.factors: list[Tensor] = []
        if G is None:
            return
        if (G[..., 0] - G[..., -1]).max() <= SAFE_SPAN:
            exponent = G - G[..., G.shape[-1] // 2, None]
            self.factors = [exp_of(exponent, dtype).unsqueeze(-1), exp_of(-exponent, dtype).unsqueeze(-2)]
        else:
            self.factors = [exp_of(G[..., :, None] - G[..., None, :], dtype)]

    def apply_(self, scores: Tensor, scale: float = 1.0) -> Tensor:
        if not self.factors:
            return scores.mul_(scale) if scale != 1.0 else scores
        first, *others = self.factors
        scores.mul_(first * scale if scale != 1.0 else first)
        for factor in others:
            scores.mul_(factor)
        return scores


# ---- 3 delta_transform --------------------------------------------------------------------------------------------


def delta_transform(A_kk: Tensor, beta: Tensor, segment: Segment) -> Tensor:
    """T = (I + diag(beta) A_kk)^-1, block by block: the inverse of a lower triangle [[P, 0], [R, Q]] has -Q^-1 R P^-1
    below its diagonal, so inverses of doubled size follow from two products, with the accuracy of substitution."""
    below = beta.unsqueeze(-1) * A_kk
    length = below.shape[-1]
    inverse = below.new_ones(*below.shape[:2], length, 1, 1)  # of the blocks on the diagonal, first of size 1
    size = 1
    while size < length:
        first, second = inverse[:, :, 0::2], inverse[:, :, 1::2]
        inverse = below.new_zeros(*first.shape[:3], 2 * size, 2 * size)
        inverse[..., :size, :size] = first
        inverse[..., size:, size:] = second
        between = diagonal_blocks(below, 2 * size)[..., size:, :size]
        inverse[..., size:, :size] = -(second @ between @ first) if size > 1 else -between
        size *= 2
    return inverse.squeeze(2)


def delta_apply(
    T: Tensor, k: Tensor, v: Tensor, G: Tensor | None, beta: Tensor, segment: Segment
) -> tuple[Tensor, Tensor]:
    """u = T diag(beta) V, w = T diag(beta) (K e^G)."""
    weighted = T * beta.unsqueeze(-2)
    return weighted @ v, weighted @ decay_from_start(k, G)


def delta_transform_backward(
    du: Tensor,
    dw: Tensor,
    T: Tensor,
    u: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor | None,
    beta: Tensor,
    A_kk: Tensor,
    dk: Tensor,
    dG: Tensor | None,
    segment: Segment,
) -> tuple[Tensor, Tensor, Tensor]:
    """dA_kk, dv, dbeta; adds to dk and dG. With Y = [u, w] the solution of (I + diag(beta) A_kk) Y = diag(beta) X."""
    dright_v, dright_k = T.mT @ du, T.mT @ dw
    dbelow = (dright_v @ u.mT).add_(dright_k @ w.mT).neg_().tril_(-1)
    k_decayed = decay_from_start(k, G)
    dbeta = torch.linalg.vecdot(dright_v, v)
    dbeta.add_(torch.linalg.vecdot(dright_k, k_decayed)).add_(torch.linalg.vecdot(dbelow, A_kk))
    beta = beta.unsqueeze(-1)
    dk_part = decay_from_start(dright_k.mul_(beta), G)
    dk.add_(dk_part)
    if dG is not None:
        dG.add_(_decay_gradient(k, dk_part, G))
    return dbelow.mul_(beta), dright_v.mul_(beta), dbeta


# ---- 4 chunk_states -----------------------------------------------------------------------------------------------


def chunk_states(
    k: Tensor, u: Tensor, w: Tensor | None, G: Tensor | None, state: Tensor, segment: Segment
) -> tuple[Tensor, Tensor]:
    """The state entering each chunk `[M, H, K, V]`, and v'. The only sequential pass.

    state `[N, H, K, V]` is carried on in place; in each step of the segment the first so many of the N sequences run.
    """
    k_end, end = decay_to_end(k, G).mT, end_decay(G, k.dtype)
    states = k.new_empty(*k.shape[:2], k.shape[3], u.shape[3])
    if w is None:  # what is written does not depend on the state: one product for all chunks
        for S, S_in, end_i, write in _per_step(segment.steps, state, states, end, k_end @ u):
            S_in.copy_(S)
            _carry(S, end_i, write)
        return states, u
    v_new = u.clone()
    for S, S_in, end_i, k_i, w_i, v_i in _per_step(segment.steps, state, states, end, k_end, w, v_new):
        S_in.copy_(S)
        _add_product(v_i, w_i, S, alpha=-1)
        if end_i is not None:
            S.mul_(end_i)
        _add_product(S, k_i, v_i)
    return states, v_new


def chunk_states_backward(
    do: Tensor,
    dv_new: Tensor | None,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    G: Tensor | None,
    scale: float,
    segment: Segment,
) -> Tensor:
    """The gradient of the state leaving each chunk; dstate, that of the final states, becomes that of the initial ones.

    With the delta rule, dv_new, from the chunk's outputs alone so far, becomes du. Without, what is written does not
    depend on the state: there is no w, and neither dv_new nor k is looked at.
    """
    end = end_decay(G, k.dtype)
    dstates = (decay_from_start(q, G).mT @ do).mul_(scale)  # of the states entering, from the outputs
    if w is None:
        for dS, dS_in, end_i in reversed(_per_step(segment.steps, dstate, dstates, end)):
            leaving = dS.clone()
            _carry(dS, end_i, dS_in)
            dS_in.copy_(leaving)
        return dstates
    chunked = (dstates, end, decay_to_end(k, G), w.mT, dv_new)
    for dS, dS_in, end_i, k_i, w_i, dv_i in reversed(_per_step(segment.steps, dstate, *chunked)):
        _add_product(dv_i, k_i, dS)
        leaving = dS.clone()
        _carry(dS, end_i, dS_in)
        _add_product(dS, w_i, dv_i, alpha=-1)
        dS_in.copy_(leaving)
    return dstates


# ---- 5 chunk_output -----------------------------------------------------------------------------------------------


def chunk_output(
    q: Tensor,
    k: Tensor,
    v_new: Tensor,
    G: Tensor | None,
    A_qk: Tensor,
    states: Tensor,
    scale: float,
    segment: Segment,
) -> Tensor:
    o = A_qk @ v_new
    _add_product(o, decay_from_start(q, G), states, alpha=scale)
    return o


def chunk_output_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    G: Tensor | None,
    A_qk: Tensor,
    dstates: Tensor | None,
    scale: float,
    segment: Segment,
) -> Tensor:
    """dv', and without dstates only what the outputs of its own chunk send to it."""
    dv_new = A_qk.mT @ do
    if dstates is not None:
        _add_product(dv_new, decay_to_end(k, G), dstates)
    return dv_new


# ---- 4 and 5: back to q, k, w and the decays ----------------------------------------------------------------------


def chunk_gradients(
    do: Tensor,
    du: Tensor,
    q: Tensor,
    k: Tensor,
    v_new: Tensor,
    G: Tensor | None,
    states: Tensor,
    dstates: Tensor,
    scale: float,
    segment: Segment,
    *,
    delta: bool,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dq and dk as far as the states go, dw if `delta`, dG and dlog_decay if `decay_gradient`, and dA_qk (lower
    triangular).

    What k_i leaves at the chunk's end passes the decays after i, so dlog_decay is a sum over i < t; by way of dG, terms
    of size 1 would have to cancel to leave one of size e^-50.
    """
    dA_qk = (do @ v_new.mT).tril_()
    dq = decay_from_start(do @ states.mT, G).mul_(scale)
    dk = decay_to_end(v_new @ dstates.mT, G)
    dw = (du @ states.mT).neg_() if delta else None
    if not decay_gradient:
        return dq, dk, dw, None, None, dA_qk
    through = torch.linalg.vecdot(states, dstates) * end_decay(G, k.dtype).squeeze(-1)  # what passes the whole chunk
    through = through if G.dim() == 4 else through.sum(-1)
    dlog_decay = through.unsqueeze(2).expand_as(G).contiguous()
    dlog_decay[:, :, 1:] += _decay_gradient(k, dk, G)[:, :, :-1].cumsum(2)
    return dq, dk, dw, _decay_gradient(q, dq, G), dlog_decay, dA_qk


# ---- shared -------------------------------------------------------------------------------------------------------


def decay_from_start(x: Tensor, G: Tensor | None) -> Tensor:
    """x_i e^{G_i}: from the start of the chunk to i. Without decay, x itself."""
    return x if G is None else x * exp_of(_per_channel(G), x.dtype)


def decay_to_end(x: Tensor, G: Tensor | None) -> Tensor:
    """x_i e^{G_C - G_i}: from i to the end of the chunk. Without decay, x itself."""
    return x if G is None else x * exp_of(_per_channel(G[:, :, -1:] - G), x.dtype)


def end_decay(G: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """e^{G_C}, `[M, H, 1 or K, 1]`, the decay of the state over a chunk."""
    return None if G is None else exp_of(_per_channel(G)[:, :, -1], dtype).unsqueeze(-1)


def _per_channel(G: Tensor) -> Tensor:
    return G if G.dim() == 4 else G.unsqueeze(-1)


def _decay_gradient(x: Tensor, dx: Tensor, G: Tensor) -> Tensor:
    """x dx, the gradient of an exponent from that of what it scales; summed where all channels share one.

    In float64 where it is summed: an error in dG reaches the decays of all tokens before it, and adds up in the
    gradient of a decay that they share.
    """
    return x * dx if G.dim() == 4 else (x * dx).sum(-1, dtype=torch.float64)


def _per_step(steps: list[int], state: Tensor, *chunked: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """For each step, the states of the sequences that run in it and their rows of every tensor of chunks, as views."""
    running = [state[:active] for active in steps]
    rows = ([None] * len(steps) if x is None else x.split(steps) for x in chunked)
    return list(zip(running, *rows, strict=True))


def _carry(S: Tensor, end: Tensor | None, write: Tensor) -> None:
    """S <- Diag(e^{G_C}) S + write, in place."""
    if end is None:
        S.add_(write)
    else:
        torch.addcmul(write, end, S, out=S)


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, over the leading dimensions [M, H], in place."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=alpha)
