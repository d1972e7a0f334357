"""The recurrence itself, token by token: the contract that every other implementation is measured against.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (h_t C_t + D x_t) silu(z_t)

Differentiable by autograd, in float32 at least; slow on purpose.
"""

import itertools

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor,  # [B, T, D]
    dt: Tensor,  # [B, T, D]
    A: Tensor,  # [D, N]
    B: Tensor,  # [B, T, N]
    C: Tensor,  # [B, T, N]
    D: Tensor | None,  # [D]
    z: Tensor | None,  # [B, T, D]
    initial_state: Tensor | None,  # [B or number of sequences, D, N]
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final state [B or number of sequences, D, N]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = x.new_zeros(rows, *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if cu_seqlens is not None:
        return _packed(x, dt, A, B, C, D, z, state, cu_seqlens)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    outputs = []
    for t in range(x.shape[1]):
        write = (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        state = (dt[:, t, :, None] * A).exp() * state + write
        outputs.append((state * C[:, t, None, :]).sum(dim=-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * x
    return y if z is None else y * torch.nn.functional.silu(z.to(dtype)), state


def _packed(x, dt, A, B, C, D, z, states, cu_seqlens):
    """Each packed sequence on its own, one after the other; an empty one leaves its state as it was."""
    outputs, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = states[n : n + 1]
        if start < end:
            x_n, dt_n, B_n, C_n, z_n = (None if tensor is None else tensor[:, start:end] for tensor in (x, dt, B, C, z))
            output, state = selective_scan_reference(x_n, dt_n, A, B_n, C_n, D, z_n, state, None)
            outputs.append(output)
        finals.append(state)
    return torch.cat(outputs, dim=1), torch.cat(finals)
