"""Linear attention whose states are shared by groups of query heads, as the keys and values of the teacher are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.layers.base import LayerState, recur


def grouped_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: LayerState | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Additive linear attention, continued from `state["S"]` where there is a state.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T        o_th = S_t^T q_th        for the G query heads h of a group

    Heads of v that share q and k are what the op offers; here heads of q share k, v and S. So the queries of a group go
    in as G rows of time, the first of which alone brings the key and the decay. The work is that of repeated keys, the
    state is G times smaller.

    Args:
        q: `[B, T, H, F]`. k: `[B, T, HS, F]`. v: `[B, T, HS, V]`. log_decay: g, `[B, T, HS, F]`. H = G HS.
        state: its S is `[B or N, HS, F, V]`, updated in place.
        cu_seqlens: `[N + 1]`, with B = 1.

    Returns:
        `[B, T, H, V]`.
    """
    if state is not None and q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        if state.journal is not None:
            state.record("S", _write_token, k, v, log_decay)
        _write_token(k, v, log_decay, state=state)
        return read_state(q[:, 0], state["S"])[:, None]
    group = q.shape[2] // k.shape[2]
    if group == 1:
        return recur(q, k, v, log_decay, scale=1.0, state=state, cu_seqlens=cu_seqlens)

    def first_of_group(x: Tensor) -> Tensor:  # [B, T, HS, *] -> [B, T * G, HS, *], zero but in the first row
        return F.pad(x[:, :, None], (0, 0, 0, 0, 0, group - 1)).flatten(1, 2)

    q = q.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)
    log_decay = None if log_decay is None else first_of_group(log_decay)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens * group
    k, v = first_of_group(k), first_of_group(v)
    o = recur(q, k, v, log_decay, scale=1.0, micro_steps=group, state=state, cu_seqlens=cu_seqlens)
    return o.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)


def _write_token(k: Tensor, v: Tensor, log_decay: Tensor | None, *, state: LayerState) -> None:
    """One token per row, without gradients."""
    S = state.writable("S")
    if log_decay is not None:
        S.mul_(log_decay[:, 0, :, :, None].exp())
    add_to_state(S, k, v)


def add_to_state(S: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> None:
    """S <- S + sum_t k_t v_t^T in place, in all rows of `[B, HS, F, V]` or in those of the index `rows`.

    k: `[B or rows, T, HS, F]`. v: `[B or rows, T, HS, V]`.
    """
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    if rows is not None:
        S.index_add_(0, rows, (k @ v).to(S.dtype))
    elif k.shape[-1] == 1:
        S.addcmul_(k, v)
    else:
        S += k @ v


def read_state(q: Tensor, S: Tensor) -> Tensor:
    """o_h = S^T q_h: `[B, H, F]` and `[B, HS, F, V]` to `[B, H, V]`."""
    return torch.bmm(q.reshape(S.shape[0] * S.shape[1], -1, q.shape[-1]), S.flatten(0, 1)).view(*q.shape[:2], -1)
