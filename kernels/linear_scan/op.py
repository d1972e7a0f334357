"""The scan as a custom op with autograd, for both backends: one opaque node for `torch.compile`."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lm_zoo.kernels.first_call import compiles_at_once
from lm_zoo.kernels.library import op

# What has the scans and the step, by backend; imported when it is first used, as not every machine has a Triton.
SCANS = {"torch": "lm_zoo.kernels.linear_scan.two_level", "triton": "lm_zoo.kernels.linear_scan.triton_scan"}
# How far |decay| may be above 1: the rounding of a complex number on the unit circle, and of finite differences.
SLACK = 1e-5


def scans(backend: str) -> ModuleType:
    return importlib.import_module(SCANS[backend])


@op("linear_scan")
@compiles_at_once
def linear_scan(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """h and the final states."""
    _check_values(decay, initial_state)
    return scans(backend).linear_scan_forward(x, decay, initial_state, cu_seqlens, reverse)


def _check_values(decay: Tensor, initial_state: Tensor | None) -> None:
    """On a CPU; elsewhere looking at the values would stall the device."""
    if decay.device.type != "cpu":
        return
    # The real and the imaginary part on their own for complex decays: a bound that costs no pass over the magnitudes.
    low, high = torch.aminmax(torch.view_as_real(decay) if decay.is_complex() else decay)
    worst = max(-low.item(), high.item())
    if worst > 1 + SLACK:
        raise ValueError(f"decay must have |decay| <= 1, got {worst:.6g}: pass the decay itself, not its logarithm")
    if initial_state is not None and not initial_state.isfinite().all():
        raise ValueError("initial_state must be finite, got NaN or infinity: reset the state")


@linear_scan.register_fake
def _(x, decay, initial_state, cu_seqlens, reverse, backend):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("lm_zoo::linear_scan_backward", mutates_args=())
@compiles_at_once
def linear_scan_backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, ddecay and dinitial_state (empty for no initial state)."""
    inputs = (dh, dfinal_state, decay, initial_state, cu_seqlens, h, reverse)
    return scans(backend).linear_scan_backward(*inputs)


@linear_scan_backward.register_fake
def _(dh, dfinal_state, decay, initial_state, cu_seqlens, h, reverse, backend):
    dinitial_state = h.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return h.new_empty(h.shape), decay.new_empty(decay.shape), dinitial_state


def _setup_context(ctx, inputs, output):
    _, decay, initial_state, cu_seqlens, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(decay, initial_state, cu_seqlens, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dfinal_state):
    decay, initial_state, cu_seqlens, h = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    inputs = (dh, dfinal_state, decay, initial_state, cu_seqlens, h)
    dx, ddecay, dinitial_state = linear_scan_backward(*inputs, ctx.reverse, ctx.backend)
    return dx, ddecay, None if initial_state is None else dinitial_state, None, None, None


linear_scan.register_autograd(_backward, setup_context=_setup_context)
