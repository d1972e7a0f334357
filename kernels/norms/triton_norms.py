"""The norms in Triton, forward and backward: one kernel each, with weight, gate and mean as its flags.

    n = x r        r = 1 / sqrt(sum(x^2) / N + eps), N = D or 1        y = n * weight * silu(gate)

The backward pass keeps the inputs only and computes r again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.library import op
from lm_zoo.kernels.triton_kernel import kernel

BLOCK = 2048  # numbers in a tile: several rows if they are short
RUN = 16  # tiles whose gradient of the weight one program sums


@triton.jit
def load_tile(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@kernel
def forward_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    y_ptr,
    rows,
    eps,
    D: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = x / sqrt(sum(x^2) / N + eps) * weight * silu(gate)"""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (channel < D)[None, :]
    offset = row[:, None] * D + channel[None, :]
    x = load_tile(x_ptr, offset, mask)
    square = tl.sum(x * x, axis=1)
    y = x * tl.rsqrt((square / D if MEAN else square) + eps)[:, None]
    if weight_ptr is not None:
        y *= load_tile(weight_ptr, channel, channel < D)[None, :]
    if gate_ptr is not None:
        gate = load_tile(gate_ptr, offset, mask)
        y *= gate * tl.sigmoid(gate)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    gate_ptr,
    dx_ptr,
    dweight_ptr,
    dgate_ptr,
    rows,
    eps,
    D: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """dn = dy * weight * silu(gate)    dx = r (dn - n sum(dn n) / N)    dweight = sum over rows of dy * n * silu(gate)

    Over RUN tiles of rows; what they add to dweight goes to `dweight_ptr` `[runs, D]`.
    """
    channel = tl.arange(0, BLOCK_D)
    inside = channel < D
    if weight_ptr is not None:
        weight = load_tile(weight_ptr, channel, inside)[None, :]
        dweight = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(RUN):
        row = (tl.cast(tl.program_id(0), tl.int64) * RUN + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & inside[None, :]
        offset = row[:, None] * D + channel[None, :]
        x = load_tile(x_ptr, offset, mask)
        dn = load_tile(dy_ptr, offset, mask)
        square = tl.sum(x * x, axis=1)
        r = tl.rsqrt((square / D if MEAN else square) + eps)[:, None]
        n = x * r
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, offset, mask)
            s = tl.sigmoid(gate)
            dgate = dn * n * s * (1 + gate * (1 - s))
            if weight_ptr is not None:
                dgate *= weight
            tl.store(dgate_ptr + offset, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dn *= gate * s
        if weight_ptr is not None:
            dweight += tl.sum(dn * n, axis=0)
            dn *= weight
        along = tl.sum(dn * n, axis=1)
        dx = r * (dn - n * (along / D if MEAN else along)[:, None])
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(dweight_ptr + tl.cast(tl.program_id(0), tl.int64) * D + channel, dweight, mask=inside)


def _tiles(size: int) -> dict[str, int]:
    """How rows of `size` are laid out in tiles and over warps."""
    block_d = triton.next_power_of_2(size)
    return {
        "D": size,
        "BLOCK_R": max(1, BLOCK // block_d),
        "BLOCK_D": block_d,
        "num_warps": 4 if block_d <= 1024 else min(16, block_d // 512),
    }


@op("norm")
def norm_forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> Tensor:
    """y; the square is divided by D if `mean`."""
    x, weight, gate = (tensor if tensor is None else tensor.contiguous() for tensor in (x, weight, gate))
    tiles = _tiles(x.shape[-1])
    rows = x.numel() // max(x.shape[-1], 1)
    y = x.new_empty(x.shape)
    if x.numel():
        forward_kernel[(triton.cdiv(rows, tiles["BLOCK_R"]),)](x, weight, gate, y, rows, eps, MEAN=mean, **tiles)
    return y


@norm_forward.register_fake
def _(x, weight, gate, eps, mean):
    return x.new_empty(x.shape)


@torch.library.custom_op("lm_zoo::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dgate; empty for an input that is `None`."""
    dy, x, weight, gate = (tensor if tensor is None else tensor.contiguous() for tensor in (dy, x, weight, gate))
    tiles = _tiles(x.shape[-1])
    rows = x.numel() // max(x.shape[-1], 1)
    runs = triton.cdiv(rows, RUN * tiles["BLOCK_R"])
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    sums = None if weight is None else x.new_empty(runs, x.shape[-1], dtype=torch.float32)  # of every run
    if x.numel():
        backward_kernel[(runs,)](
            dy, x, weight, gate, dx, sums, None if gate is None else dgate, rows, eps, MEAN=mean, RUN=RUN, **tiles
        )
    return dx, x.new_empty(0) if weight is None else sums.sum(dim=0).to(weight.dtype), dgate


@norm_backward.register_fake
def _(dy, x, weight, gate, eps, mean):
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (x, weight, gate))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.mean = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    x, weight, gate = ctx.saved_tensors
    dx, dweight, dgate = norm_backward(dy, x, weight, gate, ctx.eps, ctx.mean)
    return dx, None if weight is None else dweight, None if gate is None else dgate, None, None


norm_forward.register_autograd(_backward, setup_context=_setup_context)
