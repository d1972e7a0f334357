"""One token, or a few in a row, with the state updated in place: what decoding runs.

The same recurrence as `reference.py`, without autograd: in PyTorch in as few calls and passes over the state as it
allows, since a step of a small model costs as much as its calls; on a GPU in one launch (`triton_step.py`).
"""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import check_same, check_shape, check_tensor
from lm_zoo.kernels.sequence_parallel.group import refuse_steps

STATE_DTYPES = (torch.float32, torch.float64)
MAX_SIZE = 256  # of K and V, in the Triton kernel


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
    refuse_steps("linear_attention_step")
    _check_arguments(q, k, v, log_decay, beta, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    step = _steps
    if choose("auto", q, unsupported=_not_in_triton(state)) == "triton":
        from lm_zoo.kernels.linear_attention.triton_step import linear_attention_steps_triton as step
    if not torch.is_autocast_enabled(q.device.type):
        return step(q, k, v, log_decay, beta, state, scale)
    with torch.autocast(q.device.type, enabled=False):  # it would round what is read from the state to its dtype
        return step(q, k, v, log_decay, beta, state, scale)


def _step(q, k, v, log_decay, beta, state, scale) -> Tensor:
    """One token, with a time dimension of 1 or without."""
    key_size, value_size = state.shape[2:]
    rows = state.shape[0] * state.shape[1]  # one matrix per sequence and head
    output_dtype, dtype = v.dtype, state.dtype
    if output_dtype != dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    groups = v.shape[-2] // q.shape[-2]
    if groups > 1:
        q, k = (x.unsqueeze(-2).expand(*x.shape[:-1], groups, key_size) for x in (q, k))
    S = state.reshape(rows, key_size, value_size)  # a copy, if the state is not contiguous
    q, k, write = q.reshape(rows, 1, key_size), k.reshape(rows, 1, key_size), v.reshape(rows, 1, value_size)
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        decay = decay.expand(state.shape[:2]) if decay.dim() == 1 else decay
        S.mul_(decay.reshape(rows, -1, 1))
    if beta is not None:
        write = torch.baddbmm(write, k, S, alpha=-1).mul_(beta.to(dtype).reshape(rows, 1, 1))
    S.addcmul_(k.mT, write)
    o = torch.baddbmm(write, q, S, beta=0, alpha=scale)  # with beta = 0, what is in `write` does not matter
    if not state.is_contiguous():
        state.copy_(S.view(state.shape))
    return o.view(v.shape).to(output_dtype)


def _steps(q, k, v, log_decay, beta, state, scale) -> Tensor:
    """T tokens in a row, or one without a time dimension."""
    if q.dim() == 3 or q.shape[1] == 1:
        return _step(q, k, v, log_decay, beta, state, scale)

    def at(x: Tensor | None, t: int) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x.select(1, t)

    outputs = [_step(*(at(x, t) for x in (q, k, v, log_decay, beta)), state, scale) for t in range(q.shape[1])]
    return torch.stack(outputs, dim=1) if outputs else torch.empty_like(v)


def _not_in_triton(state: Tensor) -> str | None:
    if state.dtype != torch.float32:
        return f"its kernel keeps a float32 state, this one is {state.dtype}".replace("torch.", "")
    if max(state.shape[2:]) > MAX_SIZE:
        return f"its kernel takes K and V up to {MAX_SIZE}, got {list(state.shape[2:])}"
    return None


def _check_arguments(q, k, v, log_decay, beta, state) -> None:
    """Decoding is one call per token and layer, so what fits is passed at once and looked at closely only otherwise."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    check_tensor("state", state, STATE_DTYPES)
    time = "" if q.dim() == 3 else "T, "
    if q.dim() not in (3, 4):
        check_shape("q", q, "[B, T, H, K]", (-1, -1, -1, -1))
    *lead, heads, key_size = q.shape
    check_shape("v", v, f"[B, {time}HV, V]", (*lead, -1, -1))
    value_heads, value_size = v.shape[-2:]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"v must have a multiple of the {heads} heads of q and k, got HV = {value_heads}")
    expected = [
        ("k", k, f"[B, {time}H, K]", q.shape),
        ("v", v, f"[B, {time}HV, V]", v.shape),
        ("state", state, "[B, HV, K, V]", (lead[0], value_heads, key_size, value_size)),
    ]
    if beta is not None:
        expected.append(("beta", beta, f"[B, {time}HV]", (*lead, value_heads)))
    if log_decay is not None:
        check_tensor("log_decay", log_decay)
        layouts = {
            1: ("[HV]", (value_heads,)),
            q.dim(): (f"[B, {time}HV, K]", (*lead, value_heads, key_size)),
        }
        default = (f"[B, {time}HV]", (*lead, value_heads))
        expected.append(("log_decay", log_decay, *layouts.get(log_decay.dim(), default)))
    for name, x, layout, shape in expected:
        check_tensor(name, x)
        if x.shape != shape:
            check_shape(name, x, layout, tuple(shape))
        check_same(name, x, "q", q, dtype=name in ("k", "v"))
