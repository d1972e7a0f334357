"""The convolution in Triton: launches of `triton_kernels.py`, as custom ops with autograd.

Saved for the backward pass is the input only. Which sequence a packed token belongs to is found on the device.
"""

import torch
import triton
from torch import Tensor

from lm_zoo.kernels.causal_conv.triton_kernels import (
    backward_kernel,
    forward_kernel,
    state_backward_kernel,
    step_kernel,
)
from lm_zoo.kernels.library import op

BLOCK_T, BLOCK_D = 16, 64
BACKWARD_BLOCK_T = 4  # in larger tiles what is computed again of later tokens would spill registers
STEP_BLOCK_D = 128
RUN = 256  # tokens whose gradients of the weights one program sums
NUM_WARPS = 4


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The arguments of `causal_conv1d`, checked."""
    silu = activation == "silu"
    one_token = x.shape[1] == 1 and state is not None and cu_seqlens is None
    if one_token and state.is_contiguous() and not torch.is_grad_enabled():
        return conv_step(x, weight, bias, state, silu)
    past = None if state is None or weight.shape[1] == 1 else state
    if past is not None and torch.is_grad_enabled():
        past = past.clone()  # saved for the backward pass, and the state is overwritten below
    y = conv_forward(x, weight, bias, past, cu_seqlens, silu)
    if past is not None:
        state.copy_(_last_inputs(x, past, cu_seqlens))
    return y


def _last_inputs(x: Tensor, past: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state after x, differentiable."""
    reach = past.shape[2]
    past = past.mT.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([past, x[:, -reach:]], dim=1)[:, -reach:].mT
    slot = cu_seqlens.diff()[:, None] + torch.arange(reach, device=x.device)  # of past and sequence, end to end
    token = cu_seqlens[:-1, None] + slot - reach
    older = past.gather(1, slot.clamp(max=reach - 1).long()[..., None].expand_as(past))
    return torch.where((slot < reach)[..., None], older, x[0, token.clamp(min=0)]).mT


def _inputs(x, weight, bias, past, cu_seqlens, silu):
    """What all kernels take, in their order, the sequence of every token among them; and the flags."""
    sequences = None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        sequences = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    x = x if x.stride(2) == 1 else x.contiguous()
    bias, past = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, past))
    flags = {"W": weight.shape[1], "SILU": silu, "num_warps": NUM_WARPS}
    return x, weight.contiguous(), bias, past, sequences, cu_seqlens, flags


@op("causal_conv1d")
def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """y; `past` is the state before x."""
    x, weight, bias, past, sequences, cu_seqlens, flags = _inputs(x, weight, bias, past, cu_seqlens, silu)
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    grid = (triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_D), batch)
    forward_kernel[grid](
        x,
        weight,
        bias,
        past,
        sequences,
        cu_seqlens,
        y,
        length,
        channels,
        *x.stride()[:2],
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        **flags,
    )
    return y


@conv_forward.register_fake
def _(x, weight, bias, past, cu_seqlens, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("lm_zoo::causal_conv1d_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dpast; the last two are empty for an input that is `None`."""
    x, weight, bias, past, sequences, cu_seqlens, flags = _inputs(x, weight, bias, past, cu_seqlens, silu)
    dy = dy.contiguous()
    batch, length, channels = x.shape
    width = weight.shape[1]
    run = min(RUN, max(BACKWARD_BLOCK_T, triton.next_power_of_2(length)))
    blocks, runs = triton.cdiv(channels, BLOCK_D), triton.cdiv(length, run)
    dx = x.new_empty(x.shape)
    sums = x.new_empty(batch, runs, width + 1, channels, dtype=torch.float32)  # of every run: dweight, and dbias
    backward_kernel[(runs, blocks, batch)](
        dy,
        x,
        weight,
        bias,
        past,
        sequences,
        cu_seqlens,
        dx,
        sums,
        length,
        channels,
        *x.stride()[:2],
        BLOCK_T=BACKWARD_BLOCK_T,
        BLOCK_D=BLOCK_D,
        RUN=run,
        TAPS=triton.next_power_of_2(width + 1),
        **flags,
    )
    dpast = x.new_empty(0) if past is None else torch.empty_like(past)
    if past is not None:
        state_backward_kernel[(past.shape[0], blocks)](
            dy,
            x,
            weight,
            bias,
            past,
            cu_seqlens,
            dpast,
            length,
            channels,
            *x.stride()[:2],
            BLOCK_T=triton.next_power_of_2(width - 1),
            BLOCK_D=BLOCK_D,
            **flags,
        )
    dweight = sums[:, :, :width].sum(dim=(0, 1)).T.to(weight.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else sums[:, :, width].sum(dim=(0, 1)).to(bias.dtype)
    return dx, dweight, dbias, dpast


@conv_backward.register_fake
def _(dy, x, weight, bias, past, cu_seqlens, silu):
    return tuple(
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (x, weight, bias, past)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    x, weight, bias, past, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dpast = conv_backward(dy, x, weight, bias, past, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None, None


conv_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("lm_zoo::causal_conv1d_step", mutates_args=("state",))
def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """y of the one token of x `[B, 1, D]`; the state is updated in place."""
    x, weight, bias, _, _, _, flags = _inputs(x, weight, bias, None, None, silu)
    batch, _, channels = x.shape
    y = x.new_empty(x.shape)
    step_kernel[(batch, triton.cdiv(channels, STEP_BLOCK_D))](
        x,
        weight,
        bias,
        state,
        y,
        channels,
        x.stride(0),
        BLOCK_D=STEP_BLOCK_D,
        SLOTS=triton.next_power_of_2(max(weight.shape[1] - 1, 1)),
        **flags,
    )
    return y


@conv_step.register_fake
def _(x, weight, bias, state, silu):
    return x.new_empty(x.shape)
