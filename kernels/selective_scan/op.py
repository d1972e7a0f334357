"""The scan as a custom op with autograd, for both backends: one opaque node for `torch.compile`."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lm_zoo.kernels.first_call import compiles_at_once
from lm_zoo.kernels.library import op
from lm_zoo.kernels.selective_scan.segmented import border_shape, initial_states

# What has the passes, by backend; imported when it is first used, as not every machine has a Triton.
FORWARD = {"torch": "segmented", "triton": "triton_scan"}
BACKWARD = {"torch": "segmented", "triton": "triton_backward"}
STEP = {"torch": "torch_passes", "triton": "triton_step"}
MAX_STATE_SIZE = 256  # whose states Triton's kernels hold in registers


def passes(modules: dict[str, str], backend: str) -> ModuleType:
    return importlib.import_module(f"lm_zoo.kernels.selective_scan.{modules[backend]}")


def why_not_triton(A: Tensor) -> str | None:
    size = A.shape[1]
    return None if size <= MAX_STATE_SIZE else f"selective_scan takes up to N = {MAX_STATE_SIZE} states, A has {size}"


def _rehearse_backward(arguments: tuple, results: tuple[Tensor, ...]) -> None:
    *inputs, save, backend = arguments
    if save:
        selective_scan_backward(results[0], None, *inputs, results[2], backend)


@op("selective_scan")
@compiles_at_once(then=_rehearse_backward)
def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final states and what the backend saves for its backward pass if `save`."""
    _check_values(dt, A, initial_state)
    inputs = (x, dt, A, B, C, D, z, initial_state, cu_seqlens, save)
    return passes(FORWARD, backend).selective_scan_forward(*inputs)


def _check_values(dt: Tensor, A: Tensor, initial_state: Tensor | None) -> None:
    """On a CPU; elsewhere looking at the values would stall the device."""
    if A.device.type != "cpu":
        return
    if A.max() > 0:
        raise ValueError(f"A must be <= 0, got {A.max().item():.6g}: pass -exp(A_log)")
    if dt.min() < 0:
        raise ValueError(f"dt must be >= 0, got {dt.min().item():.6g}: pass it through softplus")
    if initial_state is not None and not initial_state.isfinite().all():
        raise ValueError("initial_state must be finite, got NaN or infinity: reset the state")


@selective_scan_forward.register_fake
def _(x, dt, A, B, C, D, z, initial_state, cu_seqlens, save, backend):
    states = initial_states(x, A, initial_state, cu_seqlens)
    saved = border_shape(x, A, cu_seqlens) if save and backend == "torch" else 0
    return x.new_empty(x.shape), states, x.new_empty(saved, dtype=states.dtype)


@torch.library.custom_op("lm_zoo::selective_scan_backward", mutates_args=())
@compiles_at_once
def selective_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    borders: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D, z and the initial state (empty for an input that is `None`)."""
    inputs = (dy, dfinal_state, x, dt, A, B, C, D, z, initial_state, cu_seqlens, borders)
    return passes(BACKWARD, backend).selective_scan_backward(*inputs)


@selective_scan_backward.register_fake
def _(dy, dfinal_state, x, dt, A, B, C, D, z, initial_state, cu_seqlens, borders, backend):
    inputs = (x, dt, A, B, C, D, z, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, _):
    *inputs, cu_seqlens, borders = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    with torch.autocast(dy.device.type, enabled=False):  # it would round states to its dtype
        gradients = selective_scan_backward(dy, dfinal_state, *inputs, cu_seqlens, borders, ctx.backend)
    gradients = [None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return *gradients, None, None, None


selective_scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(*inputs: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """x, dt, A, B, C, D, z, initial_state and cu_seqlens, as the public `selective_scan` has checked them."""
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return selective_scan_forward(*inputs, save, backend)[:2]
