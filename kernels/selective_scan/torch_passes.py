"""The passes over one segment, and one token, in PyTorch, on any device; quick on a CPU. `segmented.py` composes them.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (h_t C_t + D x_t) silu(z_t)

S tokens, R rows, W channels: x, dt, z, y `[S, R, W]`, B, C `[S, R, N]`, A `[N, W]`, state `[R, N, W]`. What has a state
per token, `[S, R, N, W]`, lives in buffers that the caller passes on from segment to segment: `decays` for exp(dt A),
`states` for h and `gradients` for dh. Names: `dx` is the gradient of x.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.selective_scan.runs import Buffer, Inputs

LOG2_E = math.log2(math.e)


def segment_forward(inputs: Inputs, state: Tensor, decays: Buffer, states: Buffer) -> Tensor:
    """y; `state`, the one before the segment, becomes the one after it."""
    _segment_states(inputs, state, decays, states)
    state.copy_(states.steps[-1])
    y = _segment_output(inputs, states.values)
    return y if inputs.z is None else y.mul_(F.silu(inputs.z))


def segment_backward(
    dy: Tensor, dstate: Tensor, inputs: Inputs, state: Tensor, decays: Buffer, states: Buffer, gradients: Buffer
) -> Inputs:
    """The gradients of the inputs; `dstate`, that of the state after the segment, becomes that of the one before it.

    dh_t = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}        d(dt_t A) = dh_t exp(dt_t A) h_{t-1}
    """
    x, dt, A, B, C, D, z = inputs
    _segment_states(inputs, state, decays, states)
    dz = dD = None
    if z is not None:
        dz = torch.ops.aten.silu_backward(dy * _segment_output(inputs, states.values), z)
        dy = dy * F.silu(z)

    torch.mul(dy.unsqueeze(2), C.unsqueeze(3), out=gradients.values)
    gradients.steps[-1].add_(dstate)
    backwards = zip(reversed(gradients.steps), reversed(decays.steps), strict=True)
    for (following, decay), (dstep, _) in itertools.pairwise(backwards):
        dstep.addcmul_(decay, following)
    torch.mul(decays.steps[0], gradients.steps[0], out=dstate)

    # From here on the buffers take what replaces their contents.
    decays.values[1:].mul_(states.values[:-1])
    decays.steps[0].mul_(state)
    dexponents = decays.values.mul_(gradients.values)
    dC = states.values.mul_(dy.unsqueeze(2)).sum(3)
    ddt = torch.mul(dexponents, A, out=states.values).sum(2)
    dA = dexponents.mul_(dt.unsqueeze(2)).sum((0, 1))
    dwrite = _sum_states(gradients.values, B)  # of dt x
    dB = gradients.values.mul_((dt * x).unsqueeze(2)).sum(3)
    ddt.addcmul_(dwrite, x)
    dx = dwrite.mul_(dt)
    if D is not None:
        dx.addcmul_(dy, D)
        dD = (dy * x).sum((0, 1))
    return Inputs(dx, ddt, dA, dB, dC, dD, dz)


def _segment_states(inputs: Inputs, state: Tensor, decays: Buffer, states: Buffer) -> None:
    torch.mul(inputs.dt.unsqueeze(2), inputs.A * LOG2_E, out=decays.values)
    decays.values.exp2_()  # on a CPU more than twice as quick as exp
    torch.mul((inputs.dt * inputs.x).unsqueeze(2), inputs.B.unsqueeze(3), out=states.values)
    for decay, step in zip(decays.steps, states.steps, strict=True):
        state = step.addcmul_(decay, state)


def _segment_output(inputs: Inputs, states: Tensor) -> Tensor:
    """Before the gate."""
    y = _sum_states(states, inputs.C)
    return y if inputs.D is None else y.addcmul_(inputs.x, inputs.D)


def _sum_states(states: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n states_n: `[S, R, N, W]` with `[S, R, N]` to `[S, R, W]`."""
    products = torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1))
    return products.view(*weights.shape[:2], -1)


def selective_scan_step(x, dt, A, B, C, D, z, state) -> Tensor:
    """One token, `[B, D]`; in the dtype of the state, which is updated in place."""
    dtype = state.dtype
    xs, dts = x.to(dtype), dt.to(dtype)
    state.mul_(((dts * LOG2_E).unsqueeze(2) * A.to(dtype)).exp2_())  # on a CPU more than twice as quick as exp
    state.addcmul_((dts * xs).unsqueeze(2), B.to(dtype).unsqueeze(1))
    y = (state * C.to(dtype).unsqueeze(1)).sum(dim=2)  # as a product, autocast would round the state
    if D is not None:
        y.addcmul_(xs, D.to(dtype))
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype)
