"""The recurrences over a segment: each op run as if nothing came before, and what the state that enters adds.

All of them are affine in their initial state, o = o_0 + R S_in and S_out = E + M S_in. Each function takes the op
itself, calls it for its own tokens, and has the state carried from segment to segment (`carry.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.sequence_parallel.carry import Carry, Matrix, Product
from lm_zoo.kernels.sequence_parallel.group import SequenceGroup, alone
from lm_zoo.kernels.sequence_parallel.segment import Segment

WIDEST = 256  # columns of a state in one call: Triton's kernels hold no more

Op = Callable[..., tuple[Tensor, Tensor | None]]


@torch.compiler.disable
def linear_attention_segment(
    op: Op,
    group: SequenceGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The arguments of `linear_attention`, checked."""
    segment = Segment(group, q.shape[1], cu_seqlens, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    has_states = initial_state is not None or output_final_state
    run = _delta if beta is not None or (segment.packed and has_states) else _additive
    dtype = torch.promote_types(q.dtype, torch.float32)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    with alone(), torch.autocast(q.device.type, enabled=False):  # it would round states to its dtype
        o, final = run(op, segment, q, k, v, log_decay, beta, scale, initial_state, output_final_state, backend)
    return o.to(v.dtype), final


def _additive(op, segment, q, k, v, log_decay, beta, scale, initial_state, output_final_state, backend):
    """M is the product of the decays and E a product of keys and values: both there before any output is computed."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = v.shape[2] // q.shape[2]
    before, after = _decay_sums(log_decay, segment, v)
    keys, values = k.to(dtype).repeat_interleave(groups, dim=2), v.to(dtype)
    if after is not None:
        keys = keys * after.to(dtype).exp()
    E = torch.einsum("bthk,bthv->bhkv", keys, values)
    M = E.new_ones(1, 1, 1, 1) if before is None else before[:, -1, :, :, None].to(dtype).exp()
    carry = Carry(segment.group, M, E, segment.start_of(initial_state), Product)
    o, _ = op(q, k, v, log_decay, scale=scale, cu_seqlens=segment.cu_seqlens, backend=backend)
    S_in = carry.arrive()
    queries = q.to(dtype).repeat_interleave(groups, dim=2) * scale
    if before is not None:
        queries = queries * before.to(dtype).exp()
    o = o.to(dtype) + torch.einsum("bthk,bhkv->bthv", queries, S_in)
    return o, segment.final(torch.addcmul(E, M, S_in)) if output_final_state else None


def _decay_sums(log_decay: Tensor | None, segment: Segment, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the decays up to every token, itself included, and after it, `[B, T, HV or 1, K or 1]`.

    A document's first token forgets all before it. Each sum starts from where it is small: none is a difference.
    """
    if log_decay is None and not segment.packed:
        return None, None
    if log_decay is None:
        g = v.new_zeros(1, segment.length, 1, 1)
    else:
        g = log_decay.expand(*v.shape[:2], -1) if log_decay.dim() == 1 else log_decay
        g = g.unsqueeze(-1) if g.dim() == 3 else g
    wide = torch.float32 if g.device.type == "mps" else torch.float64
    g = g.to(wide)
    if segment.packed:
        g = g.masked_fill(segment.first[None, :, None, None], -torch.inf)
    later = F.pad(g[:, 1:], (0, 0, 0, 0, 0, 1))
    return g.cumsum(1), later.flip(1).cumsum(1).flip(1)


def _delta(op, segment, q, k, v, log_decay, beta, scale, initial_state, output_final_state, backend):
    """K more columns, of value 0 and with the identity for a state: what becomes of them are R and M."""
    dtype, K, V = torch.promote_types(q.dtype, torch.float32), q.shape[3], v.shape[3]
    rows = segment.rows(q.shape[0])
    zeros = q.new_zeros(rows, v.shape[2], K, V, dtype=dtype)
    start = zeros if initial_state is None else segment.own(initial_state)
    identity = torch.eye(K, dtype=dtype, device=q.device).expand(1, v.shape[2], K, K)
    identity = segment.entering(identity, zeros.new_zeros(rows, v.shape[2], K, K))
    parts = [(v, start), (v.new_zeros(*v.shape[:3], K), identity)]
    if V + K <= WIDEST:
        parts = [(torch.cat([part for part, _ in parts], dim=-1), torch.cat([start, identity], dim=-1))]
    options = {"scale": scale, "output_final_state": True, "cu_seqlens": segment.cu_seqlens, "backend": backend}
    found = [op(q, k, values, log_decay, beta, initial_state=state, **options) for values, state in parts]
    (o, R), (E, M) = (torch.cat(x, dim=-1).split((V, K), dim=-1) for x in zip(*found, strict=True))
    start = segment.start_of(initial_state)
    S_in = Carry(segment.group, segment.leaving(M), segment.leaving(E), start, Matrix).arrive()
    o = o.to(dtype) + torch.einsum("bthk,bhkv->bthv", R.to(dtype), S_in)
    return o, segment.final(E + M @ S_in) if output_final_state else None


@torch.compiler.disable
def linear_scan_segment(
    op: Op,
    group: SequenceGroup,
    x: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The arguments of `linear_scan`, checked. R and M are what becomes of a state of 1 without any x."""
    if reverse:
        raise ValueError("reverse=True is not shared over ranks: leave the sequence_parallel block for it")
    segment = Segment(group, x.shape[1], cu_seqlens, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    zeros = x.new_zeros(segment.rows(x.shape[0]), x.shape[2], dtype=dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    own = zeros if initial_state is None else segment.own(initial_state)
    ones = segment.entering(torch.ones_like(zeros[:1]), zeros)
    with alone():
        h, state = op(
            torch.cat([x, torch.zeros_like(x)], dim=-1),
            torch.cat([decay, decay], dim=-1),
            initial_state=torch.cat([own, ones], dim=-1),
            output_final_state=True,
            cu_seqlens=segment.cu_seqlens,
            backend=backend,
        )
    (h, R), (E, M) = h.chunk(2, dim=-1), state.chunk(2, dim=-1)
    start = segment.start_of(initial_state)
    S_in = Carry(group, segment.leaving(M), segment.leaving(E), start, Product).arrive()
    h = torch.addcmul(h.to(dtype), R.to(dtype), S_in[:, None]).to(x.dtype)
    return h, segment.final(torch.addcmul(E, M, S_in)) if output_final_state else None


@torch.compiler.disable
def selective_scan_segment(
    op: Op,
    group: SequenceGroup,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The arguments of `selective_scan`, checked.

    In two runs, the second from the state that enters: R would be a state for every token, which the op never holds.
    """
    segment = Segment(group, x.shape[1], cu_seqlens, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    zeros = x.new_zeros(segment.rows(x.shape[0]), *A.shape, dtype=dtype)
    own = zeros if initial_state is None else segment.own(initial_state)
    options = {"output_final_state": True, "cu_seqlens": segment.cu_seqlens, "backend": backend}
    with alone(), torch.autocast(x.device.type, enabled=False):
        _, E = op(x, dt, A, B, C, initial_state=own, **options)
        M = (dt.to(dtype).sum(dim=1)[..., None] * A.to(dtype)).exp()
        if segment.packed:
            M = M * segment.whole()
        S_in = Carry(group, M, segment.leaving(E), segment.start_of(initial_state), Product).arrive()
        y, state = op(x, dt, A, B, C, D, z, initial_state=segment.entering(S_in, own), **options)
    return y, segment.final(state) if output_final_state else None
