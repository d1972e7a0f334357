"""One token, or a few in a row, with the state updated in place: what decoding runs.

The same recurrence as `reference.py`, without autograd, in as few passes over the state as PyTorch allows.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_same, check_shape, check_tensor


@torch.no_grad()
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""One step of `linear_attention`; the state is updated in place, at its address.

        S <- (I - beta k k^T) Diag(exp g) S + beta k v^T        o = scale * S^T q

    Args:
        q, k: `[B, H, K]`, or `[B, T, H, K]` for T tokens in a row.
        v: `[B, HV, V]` or `[B, T, HV, V]`.
        log_decay: `None`, `[HV]`, `[B, HV]` or `[B, HV, K]`; the last two with T after B where q has it.
        beta: `None`, `[B, HV]`, or `[B, T, HV]` where q has T.
        state: `[B, HV, K, V]`, float32 (or float64). Overwritten.
        scale: `K ** -0.5` if not given.

    Returns:
        o in the shape and dtype of v. No gradient flows: train with `linear_attention`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    if torch.is_autocast_enabled(q.device.type):  # it would round what is read from the state to its dtype
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention_step(q, k, v, log_decay, beta, state, scale=scale)
    check_tensor("state", state, (torch.float32, torch.float64))
    if q.dim() == 3:  # one token: give it its time dimension, take it away at the end
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        beta = None if beta is None else beta.unsqueeze(1)
        log_decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay.unsqueeze(1)
        return linear_attention_step(q, k, v, log_decay, beta, state, scale=scale).squeeze(1)
    _check_arguments(q, k, v, log_decay, beta, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = v.shape[2] // k.shape[2]
    dtype = state.dtype
    q, k = (x.to(dtype).repeat_interleave(groups, dim=2) if groups > 1 else x.to(dtype) for x in (q, k))
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    if decay is not None:
        decay = decay.expand(*v.shape[:3]) if decay.dim() == 1 else decay
        decay = decay.unflatten(2, (v.shape[2], 1)) if decay.dim() == 3 else decay
    outputs = torch.empty(v.shape, dtype=dtype, device=v.device)
    for t in range(q.shape[1]):
        if decay is not None:
            state.mul_(decay[:, t, :, :, None])
        write = v[:, t].to(dtype)
        if beta is not None:
            write = beta[:, t, :, None].to(dtype) * (write - (k[:, t, :, None] @ state).squeeze(2))
        state.addcmul_(k[:, t, :, :, None], write[:, :, None])
        torch.mul(q[:, t, :, None] @ state, scale, out=outputs[:, t, :, None])
    return outputs.to(v.dtype)


def _check_arguments(q, k, v, log_decay, beta, state) -> None:
    check_shape("q", q, "[B, T, H, K]", (-1, -1, -1, -1))
    batch, length, heads, key_size = q.shape
    check_shape("k", k, "[B, T, H, K]", (batch, length, heads, key_size))
    check_shape("v", v, "[B, T, HV, V]", (batch, length, -1, -1))
    value_heads, value_size = v.shape[2:]
    if value_heads % heads:
        raise ValueError(f"v must have a multiple of the {heads} heads of q and k, got HV = {value_heads}")
    check_shape("state", state, "[B, HV, K, V]", (batch, value_heads, key_size, value_size))
    for name, x in (("k", k), ("v", v), ("state", state)):
        check_same(name, x, "q", q, dtype=name != "state")
    if beta is not None:
        check_shape("beta", beta, "[B, T, HV]", (batch, length, value_heads))
    if log_decay is not None and log_decay.dim() != 1:
        shape = (batch, length, value_heads, key_size)
        layout = "[B, T, HV, K]" if log_decay.dim() == 4 else "[B, T, HV]"
        check_shape("log_decay", log_decay, layout, shape if log_decay.dim() == 4 else shape[:3])
    elif log_decay is not None:
        check_shape("log_decay", log_decay, "[HV]", (value_heads,))
