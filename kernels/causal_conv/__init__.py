"""The short causal convolution along time, one filter per channel, with its state for streaming.

    y_t = sum_w weight_w x_{t - W + 1 + w} + bias

W shifted multiply-adds in the `[B, T, D]` layout, without transposes; the backward pass keeps the input only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_zoo.kernels.checks import (
    check_bounds,
    check_cu_seqlens,
    check_option,
    check_same,
    check_shape,
    check_tensor,
)

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Causal depthwise convolution along time.

        y_t = act(sum_{w < W} weight[:, w] * x_{t - W + 1 + w} + bias)

    with x before the first token taken from `state`, or zero.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`, the last column for the current token.
        bias: `[D]`.
        activation: `None` or "silu".
        state: `[B, D, W - 1]`, or `[N, D, W - 1]` with `cu_seqlens`: the last W - 1 inputs, oldest first. Updated in
            place, so that any split of a sequence into calls gives the result of one call; gradients flow back through
            earlier calls unless the state is detached.
        cu_seqlens: `[N + 1]` int32 or int64, borders of N sequences packed along time, from 0 to T; needs B = 1.
            Nothing crosses a border, also where a sequence is empty or shorter than the filter.

    Returns:
        y `[B, T, D]` in the dtype of x, summed in float32 at least.

    Raises:
        TypeError: an argument that is not a floating tensor. ValueError: a shape, device or option that does not fit;
        the message names the argument.
    """
    _check_arguments(x, weight, bias, activation, state, cu_seqlens)
    if x.shape[1] == 1 and state is not None and cu_seqlens is None and not torch.is_grad_enabled():
        return _step(x, weight, bias, activation, state)
    reach = weight.shape[1] - 1
    if cu_seqlens is None:
        padded = F.pad(x, (0, 0, reach, 0)) if state is None else torch.cat([state.mT.to(x.dtype), x], dim=1)
        y = _ShiftedSum.apply(padded, weight, bias, activation)
        last = padded[:, x.shape[1] :]
    else:
        # Each sequence gets its own W - 1 slots in front, for its past: token t of sequence n goes (n + 1)(W - 1) down.
        tokens = torch.arange(x.shape[1], device=x.device)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True)  # n + 1: empty sequences own no token
        count = cu_seqlens.numel() - 1
        slots = tokens + sequence * reach
        padded = x.new_zeros(1, x.shape[1] + count * reach, x.shape[2]).index_copy(1, slots, x)
        numbers = torch.arange(count, device=x.device)[:, None]
        past = (cu_seqlens[:-1, None] + numbers * reach + torch.arange(reach, device=x.device)).flatten()
        if state is not None:
            padded = padded.index_copy(1, past, state.mT.to(x.dtype).flatten(0, 1)[None])
        y = _ShiftedSum.apply(padded, weight, bias, activation).index_select(1, slots - reach)
        last = padded[0, past + cu_seqlens.diff().repeat_interleave(reach)].unflatten(0, (count, reach))
    if state is not None:
        state.copy_(last.mT)
    return y


class _ShiftedSum(torch.autograd.Function):
    """y_t = act(sum_w weight_w padded_{t + w} + bias), `[B, T + W - 1, D]` to `[B, T, D]`."""

    @staticmethod
    def forward(ctx, padded, weight, bias, activation):
        ctx.save_for_backward(padded, weight, bias)
        ctx.activation = activation
        y = _shifted_sum(padded, weight, bias)
        return (F.silu(y, inplace=True) if activation == "silu" else y).to(padded.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        padded, weight, bias = ctx.saved_tensors
        dtype = torch.promote_types(padded.dtype, torch.float32)
        grad_y = grad_y.to(dtype)
        if ctx.activation == "silu":
            grad_y = torch.ops.aten.silu_backward(grad_y, _shifted_sum(padded, weight, bias))
        length = grad_y.shape[1]
        grad_padded = torch.zeros_like(padded, dtype=dtype)
        grad_columns = []
        for w, column in enumerate(_columns(weight, dtype)):
            grad_padded[:, w : w + length].addcmul_(grad_y, column)
            grad_columns.append((grad_y * padded[:, w : w + length]).sum(dim=(0, 1)))
        grad_weight = torch.stack(grad_columns, dim=1).to(weight.dtype)
        grad_bias = None if bias is None else grad_y.sum(dim=(0, 1)).to(bias.dtype)
        return grad_padded.to(padded.dtype), grad_weight, grad_bias, None


def _shifted_sum(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Before the activation, in float32 at least."""
    length = padded.shape[1] - weight.shape[1] + 1
    dtype = torch.promote_types(padded.dtype, torch.float32)
    padded = padded.to(dtype)
    first, *others = _columns(weight, dtype)
    y = padded[:, :length] * first
    for w, column in enumerate(others, start=1):
        y.addcmul_(padded[:, w : w + length], column)
    return y if bias is None else y.add_(bias.to(dtype))


def _columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`[W, D]`, contiguous: with the strides of `[D, W]` the multiply-adds would not vectorise."""
    return weight.to(dtype).T.contiguous()


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor) -> Tensor:
    """One token per row: as above with T = 1, in the layout of the state."""
    window = torch.cat([state, x.mT.to(state.dtype)], dim=2)  # [B, D, W]
    state.copy_(window[:, :, 1:])
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(dtype) * weight.to(dtype)).sum(dim=-1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)[:, None]


def _check_arguments(x, weight, bias, activation, state, cu_seqlens) -> None:
    check_tensor("x", x)
    check_shape("x", x, "[B, T, D]", (-1, -1, -1))
    batch, length, channels = x.shape
    if length == 0:
        raise ValueError("x must have at least one token, got T = 0")
    check_tensor("weight", weight)
    check_shape("weight", weight, "[D, W]", (channels, -1))
    if weight.shape[1] == 0:
        raise ValueError("weight must be [D, W] with W >= 1, got W = 0")
    check_same("weight", weight, "x", x, dtype=False)
    if bias is not None:
        check_tensor("bias", bias)
        check_shape("bias", bias, "[D]", (channels,))
        check_same("bias", bias, "x", x, dtype=False)
    check_option("activation", activation, (None, "silu"))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, x.device)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would stall the device
            check_bounds(cu_seqlens.tolist(), length)
    if state is not None:
        check_tensor("state", state)
        rows, layout = (batch, "[B, D, W - 1]") if cu_seqlens is None else (cu_seqlens.numel() - 1, "[N, D, W - 1]")
        check_shape("state", state, layout, (rows, channels, weight.shape[1] - 1))
        check_same("state", state, "x", x, dtype=False)
