"""The recurrence itself, token by token: the contract that every other implementation is measured against.

    h_t = a_t * h_{t-1} + x_t          in reverse, h_t = a_t * h_{t+1} + x_t

Differentiable by autograd, in float32 or complex64 at least; slow on purpose.
"""

import itertools

import torch
from torch import Tensor


def linear_scan_reference(
    x: Tensor,  # [B, T, D]
    decay: Tensor,  # [B, T, D]
    initial_state: Tensor | None,  # [B or N, D]
    cu_seqlens: Tensor | None,  # [N + 1]
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # h [B, T, D], final state [B or N, D]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = x.new_zeros(rows, x.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if cu_seqlens is not None:
        return _packed(x, decay, state, cu_seqlens, reverse)
    x, decay = x.to(dtype), decay.to(dtype)
    order = list(range(x.shape[1]))[:: -1 if reverse else 1]
    outputs = []
    for t in order:
        state = decay[:, t] * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs[:: -1 if reverse else 1], dim=1), state


def _packed(x, decay, states, cu_seqlens, reverse):
    """Each packed sequence on its own, one after the other; an empty one leaves its state as it was."""
    outputs, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = states[n : n + 1]
        if start < end:
            part = slice(start, end)
            output, state = linear_scan_reference(x[:, part], decay[:, part], state, None, reverse)
            outputs.append(output)
        finals.append(state)
    return torch.cat(outputs, dim=1), torch.cat(finals)
