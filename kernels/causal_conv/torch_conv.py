"""The convolution in PyTorch: W shifted multiply-adds in the `[B, T, D]` layout, without transposes.

The backward pass keeps the input only.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The arguments of `causal_conv1d`, checked."""
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
            older = state.mT.to(x.dtype, copy=True)  # saved for the backward pass, and the state is overwritten below
            padded = padded.index_copy(1, past, older.flatten(0, 1)[None])
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
    """One token per row: tap by tap over the columns of the state, which then move up by one."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = (*state.unbind(2), x.squeeze(1))
    inputs, taps = columns, weight.unbind(1)
    if not x.dtype == state.dtype == weight.dtype == dtype:  # a cast that does nothing still costs a tenth of the call
        inputs, taps = [column.to(dtype) for column in columns], weight.to(dtype).unbind(1)
    y = inputs[0] * taps[0]
    for column, tap in zip(inputs[1:], taps[1:], strict=True):
        y.addcmul_(column, tap)
    if bias is not None:
        y += bias
    for column, after in itertools.pairwise(columns):
        column.copy_(after)
    return (F.silu(y, inplace=True) if activation == "silu" else y).to(x.dtype).unsqueeze(1)
