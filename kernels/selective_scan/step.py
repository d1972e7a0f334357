"""One token at a time, with the state updated in place: what decoding runs."""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import check_same, check_shape, check_tensor
from lm_zoo.kernels.selective_scan.op import STEP, passes, why_not_triton
from lm_zoo.kernels.sequence_parallel.group import refuse_steps


@torch.no_grad()
def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor,
) -> Tensor:
    r"""One step of `selective_scan`; the state is updated in place, at its address.

        h <- exp(dt A) h + dt B x        y = (h C + D x) silu(z)

    Args:
        x, dt: `[B, D]`, dt >= 0.
        A: `[D, N]`, <= 0.
        B, C: `[B, N]`.
        D: `[D]`, or `None`.
        z: `[B, D]`, or `None`.
        state: h `[B, D, N]`, float32 (or float64). Overwritten.

    Returns:
        y in the shape and dtype of x. No gradient flows: train with `selective_scan`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    refuse_steps("selective_scan_step")
    _check_arguments(x, dt, A, B, C, D, z, state)
    unsupported = "selective_scan_step writes states in float32" if state.dtype == torch.float64 else why_not_triton(A)
    backend = choose("auto", x, ("auto", "triton", "torch"), unsupported=unsupported)
    return passes(STEP, backend).selective_scan_step(x, dt, A, B, C, D, z, state)


def _check_arguments(x, dt, A, B, C, D, z, state) -> None:
    check_tensor("x", x)
    check_shape("x", x, "[B, D]", (-1, -1))
    batch, channels = x.shape
    check_tensor("A", A)
    check_shape("A", A, "[D, N]", (channels, -1))
    check_tensor("state", state, (torch.float32, torch.float64))
    shapes = {
        "dt": (dt, "[B, D]", (batch, channels)),
        "B": (B, "[B, N]", (batch, A.shape[1])),
        "C": (C, "[B, N]", (batch, A.shape[1])),
        "D": (D, "[D]", (channels,)),
        "z": (z, "[B, D]", (batch, channels)),
        "state": (state, "[B, D, N]", (batch, *A.shape)),
    }
    check_same("A", A, "x", x, dtype=False)
    for name, (tensor, layout, shape) in shapes.items():
        if tensor is None and name in ("D", "z"):
            continue
        check_tensor(name, tensor)
        check_shape(name, tensor, layout, shape)
        check_same(name, tensor, "x", x, dtype=name in ("B", "C", "z"))
