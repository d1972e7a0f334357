"""Mamba's selective scan: a diagonal state space whose step size, input and output weights depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (h_t C_t + D x_t) silu(z_t)

`reference.py` is this recurrence and nothing more. `segmented.py` computes it in PyTorch from the passes in
`torch_passes.py`, forward and backward, over what `runs.py` cuts out; `triton_scan.py` and `triton_backward.py` compute
it in Triton; `op.py` is the op that runs either. `step.py` is one token at a time, for decoding.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import check_cu_seqlens, check_same, check_shape, check_tensor
from lm_zoo.kernels.selective_scan import op
from lm_zoo.kernels.selective_scan.reference import selective_scan_reference
from lm_zoo.kernels.selective_scan.step import selective_scan_step
from lm_zoo.kernels.sequence_parallel.group import active_group
from lm_zoo.kernels.sequence_parallel.recurrences import selective_scan_segment

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752).

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (h_t C_t + D x_t) silu(z_t)

    with a state of N numbers for each of the D channels; without `D` and `z`, y_t = h_t C_t. A is real and diagonal,
    the discretization that of the paper's code. Neither pass ever holds the states of all tokens: they work through
    time in segments, and the backward pass computes the states within a segment again.

    The letters are the paper's. Here N is the size of a channel's state, not the number of packed sequences as in the
    other ops, and the arguments B and D are tensors, not the batch and the channels that shapes are written in.

    Args:
        x: `[B, T, D]`.
        dt: the step size `[B, T, D]`, >= 0: after its bias and softplus. May be of a higher precision than x.
        A: `[D, N]`, <= 0.
        B, C: input and output weights `[B, T, N]`, shared by all channels.
        D: weight of x itself in the output, `[D]`.
        z: gate `[B, T, D]`, through a SiLU.
        initial_state: h `[B, D, N]`, or `[number of sequences, D, N]` with `cu_seqlens`; zero if not given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[number of sequences + 1]` int32 or int64, borders of sequences packed along time, from 0 to T;
            needs a batch of 1. An empty sequence keeps its state.
        backend: "auto" (Triton for tensors on a GPU, PyTorch elsewhere), "triton" (N up to 256), "torch" (any device)
            or "reference" (token by token, slow).

    Returns:
        y `[B, T, D]` in the dtype of x, and the final state in the shape of the initial one (float32, or float64 for
        float64 inputs) or `None`.

    Raises:
        TypeError: an argument that is not a floating tensor. ValueError: a shape, device, dtype or option that does not
        fit or, where the tensors are on a CPU (elsewhere looking at them would stall the device), a `cu_seqlens` that
        does not run from 0 to T, an A above 0, a dt below 0 or a state that is not finite; the message names the
        argument.
    """
    _check_arguments(x, dt, A, B, C, D, z, initial_state, cu_seqlens)
    if (group := active_group()) is not None:
        options = {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return selective_scan_segment(selective_scan, group, x, dt, A, B, C, D, z, **options, backend=backend)
    backend = choose(backend, x, unsupported=op.why_not_triton(A))
    inputs = (x, dt, A, B, C, D, z, initial_state, cu_seqlens)
    with torch.autocast(x.device.type, enabled=False):  # it would round states to its dtype
        if backend == "reference":
            y, final_state = selective_scan_reference(*inputs)
        else:
            y, final_state = op.selective_scan(*inputs, backend=backend)
    return y.to(x.dtype), final_state if output_final_state else None


def _check_arguments(x, dt, A, B, C, D, z, initial_state, cu_seqlens) -> None:
    check_tensor("x", x)
    check_shape("x", x, "[B, T, D]", (-1, -1, -1))
    batch, length, channels = x.shape
    if length == 0:
        raise ValueError("x must have at least one token, got T = 0")
    check_tensor("A", A)
    check_shape("A", A, "[D, N]", (channels, -1))
    if A.numel() == 0:
        raise ValueError(f"A must be [D, N] with D and N >= 1, got {list(A.shape)}")
    check_same("A", A, "x", x, dtype=False)
    expected = {
        "dt": (dt, "[B, T, D]", (batch, length, channels)),
        "B": (B, "[B, T, N]", (batch, length, A.shape[1])),
        "C": (C, "[B, T, N]", (batch, length, A.shape[1])),
        "D": (D, "[D]", (channels,)),
        "z": (z, "[B, T, D]", (batch, length, channels)),
    }
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, x.device)
    rows, layout = (batch, "[B, D, N]") if cu_seqlens is None else (cu_seqlens.numel() - 1, "[sequences, D, N]")
    expected["initial_state"] = (initial_state, layout, (rows, *A.shape))
    for name, (tensor, layout, shape) in expected.items():
        if tensor is None and name in ("D", "z", "initial_state"):
            continue
        check_tensor(name, tensor)
        check_shape(name, tensor, layout, shape)
        check_same(name, tensor, "x", x, dtype=name in ("B", "C", "z"))
