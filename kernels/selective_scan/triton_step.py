"""One token of the selective scan in Triton, the twin of the step in `step.py`: one launch, the state in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.selective_scan.triton_scan import LOG2_E, plain
from lm_zoo.kernels.triton_kernel import kernel

STATES = 1024  # of a program


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, state: Tensor
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dt, A, B, C, D, z = map(plain, (x, dt, A, B, C, D, z))
    channels, size = A.shape
    states = triton.next_power_of_2(size)
    block = max(1, STATES // states)
    step_kernel[(x.shape[0] * triton.cdiv(channels, block),)](
        x, dt, A, B, C, D, z, state, y, channels, size, *state.stride(),
        LAST=states, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


@kernel
def step_kernel(
    x, dt, A, B, C, skip, z, state, y, D, N, stride_row, stride_channel, stride_number,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h <- exp(dt A) h + dt B x        y = (h C + D x) silu(z)

    `[BLOCK, LAST]`: along the states, as they lie in memory.
    """
    blocks = tl.cdiv(D, BLOCK)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    channel = tl.cast(tl.program_id(0) % blocks * BLOCK, tl.int64) + tl.arange(0, BLOCK)
    number = tl.arange(0, LAST)
    there, weighted = channel < D, number < N
    inside = there[:, None] & weighted[None, :]
    steps = tl.load(dt + row * D + channel, mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + row * D + channel, mask=there, other=0.0).to(tl.float32)
    rates = tl.load(A + channel[:, None] * N + number[None, :], mask=inside, other=0.0).to(tl.float32)
    write_weight = tl.load(B + row * N + number, mask=weighted, other=0.0).to(tl.float32)
    read_weight = tl.load(C + row * N + number, mask=weighted, other=0.0).to(tl.float32)
    at = state + row * stride_row + channel[:, None] * stride_channel + number[None, :] * stride_number
    h = tl.load(at, mask=inside, other=0.0)
    h = tl.exp2(steps[:, None] * (rates * LOG2_E)) * h + (steps * value)[:, None] * write_weight[None, :]
    tl.store(at, h, mask=inside)
    out = tl.sum(h * read_weight[None, :], axis=1)
    if skip is not None:
        out += tl.load(skip + channel, mask=there, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + row * D + channel, mask=there, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + row * D + channel, out, mask=there)
