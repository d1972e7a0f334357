"""The short causal convolution along time, one filter per channel, with its state for streaming.

    y_t = sum_w weight_w x_{t - W + 1 + w} + bias

`torch_conv.py` is this in shifted multiply-adds; `triton_conv.py` in kernels with the activation, forward and backward
and for one token.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.causal_conv.torch_conv import causal_conv1d_torch
from lm_zoo.kernels.checks import (
    check_bounds,
    check_cu_seqlens,
    check_option,
    check_same,
    check_shape,
    check_tensor,
)
from lm_zoo.kernels.sequence_parallel.convolution import causal_conv1d_segment
from lm_zoo.kernels.sequence_parallel.group import active_group

__all__ = ["causal_conv1d"]

BACKENDS = ("auto", "triton", "torch")
MAX_WIDTH = 16  # taps, unrolled in the Triton kernels


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
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
        backend: "auto", "triton" or "torch".

    Returns:
        y `[B, T, D]` in the dtype of x, summed in float32 at least.

    Raises:
        TypeError: an argument that is not a floating tensor. ValueError: a shape, device or option that does not fit;
        the message names the argument.
    """
    _check_arguments(x, weight, bias, activation, state, cu_seqlens)
    if (group := active_group()) is not None:
        options = {"activation": activation, "state": state, "cu_seqlens": cu_seqlens, "backend": backend}
        return causal_conv1d_segment(causal_conv1d, group, x, weight, bias, **options)
    if choose(backend, x, BACKENDS, unsupported=_not_in_triton(weight)) == "triton":
        from lm_zoo.kernels.causal_conv.triton_conv import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, activation, state, cu_seqlens)
    return causal_conv1d_torch(x, weight, bias, activation, state, cu_seqlens)


def _not_in_triton(weight: Tensor) -> str | None:
    if weight.dtype == torch.float64:
        return "its kernels sum in float32, weight is float64"
    if weight.shape[1] > MAX_WIDTH:
        return f"its kernels take filters of up to {MAX_WIDTH} tokens, this one has W = {weight.shape[1]}"
    return None


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
        on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would stall the device
        if on_host and active_group() is None:
            check_bounds(cu_seqlens.tolist(), length)
    if state is not None:
        check_tensor("state", state)
        rows, layout = (batch, "[B, D, W - 1]") if cu_seqlens is None else (cu_seqlens.numel() - 1, "[N, D, W - 1]")
        check_shape("state", state, layout, (rows, channels, weight.shape[1] - 1))
        check_same("state", state, "x", x, dtype=False)
