"""The recurrence itself, token by token: the contract that every other implementation is measured against.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

and without beta, S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T. Differentiable by autograd, in the dtype of the state that
it is given; slow on purpose.
"""

import itertools

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    log_decay: Tensor | None,  # None | [B, T, HV] | [B, T, HV, K]
    beta: Tensor | None,  # None | [B, T, HV]
    scale: float,
    initial_state: Tensor | None,  # [B or N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # o [B, T, HV, V], final state [B or N, HV, K, V]
    if cu_seqlens is not None:
        return _packed(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    q, k = (x.to(dtype).repeat_interleave(value_heads // heads, dim=2) for x in (q, k))
    v = v.to(dtype)
    decay = None if log_decay is None else log_decay.to(dtype).exp().view(batch, length, value_heads, -1, 1)
    state = q.new_zeros(batch, value_heads, key_size, value_size) if initial_state is None else initial_state.to(dtype)

    outputs = []
    for t in range(length):
        if decay is not None:
            state = decay[:, t] * state
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None].to(dtype) * (write - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def _packed(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens):
    """Each packed sequence on its own, one after the other."""
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        parts = [None if x is None else x[:, start:end] for x in (q, k, v, log_decay, beta)]
        state = None if initial_state is None else initial_state[n : n + 1]
        if start == end:  # an empty document leaves its state as it was
            states.append(_empty_state(q, v) if state is None else state)
            continue
        output, state = linear_attention_reference(*parts, scale, state, None)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _empty_state(q: Tensor, v: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros(1, v.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)
