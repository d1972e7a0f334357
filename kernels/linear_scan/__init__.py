"""Linear recurrence with a vector-valued state: one decay per token and channel.

    h_t = a_t * h_{t-1} + x_t

`reference.py` is this recurrence and nothing more. `two_level.py` computes it in PyTorch and `triton_scan.py` in
Triton, both over chunks side by side, forward and backward; `op.py` is the op that runs either. `linear_scan_step` is
one token, for decoding.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import FLOATS, check_cu_seqlens, check_same, check_shape, check_tensor
from lm_zoo.kernels.linear_scan import op
from lm_zoo.kernels.linear_scan.reference import linear_scan_reference
from lm_zoo.kernels.sequence_parallel.group import active_group, refuse_steps
from lm_zoo.kernels.sequence_parallel.recurrences import linear_scan_segment

__all__ = ["linear_scan", "linear_scan_step"]

COMPLEX = (torch.complex64, torch.complex128)


def linear_scan(
    x: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""Elementwise linear recurrence over time, real or complex.

        h_t = a_t * h_{t-1} + x_t          with `reverse`, h_t = a_t * h_{t+1} + x_t

    The recurrence of S4D (Gu et al. 2022), LRU (Orvieto et al. 2023), HGRN (Qin et al. 2023) and RG-LRU (De et al.
    2024). Never divides by products of decays, so decays of 0 (a hard reset), negative ones and products that underflow
    are exact. Time is linear in T, and so is memory.

    Args:
        x: `[B, T, D]`, real or complex.
        decay: a `[B, T, D]`, real if x is and complex if x is, |a| <= 1. The decay itself, not its logarithm. May be
            of a higher precision than x: in bfloat16, 0.999 is 1.
        initial_state: `[B, D]`, or `[N, D]` with `cu_seqlens`; zero if not given. With `reverse` it comes after the
            last token.
        output_final_state: whether to return the state after the last token (with `reverse`, at the first).
        reverse: run from the last token to the first.
        cu_seqlens: `[N + 1]` int32 or int64, borders of N sequences packed along time, from 0 to T; needs B = 1. An
            empty sequence keeps its state.
        backend: "auto" (Triton for tensors on a GPU, PyTorch elsewhere), "triton", "torch" (any device) or "reference"
            (token by token, slow).

    Returns:
        h `[B, T, D]` in the dtype of x, and the final state `[B or N, D]` or `None`. Computed, and the state returned,
        in the precision of x, but float32 or complex64 at least.

    Raises:
        TypeError: an argument that is not a floating or complex tensor. ValueError: a shape, device, dtype or option
        that does not fit or, where the tensors are on a CPU (elsewhere looking at them would stall the device), a
        `cu_seqlens` that does not run from 0 to T, a decay above 1 in magnitude or a state that is not finite; the
        message names the argument.
    """
    _check_arguments(x, decay, "[B, T, D]")
    if x.shape[1] == 0:
        raise ValueError("x must have at least one token, got T = 0")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.device)
    if initial_state is not None:
        rows, layout = (x.shape[0], "[B, D]") if cu_seqlens is None else (cu_seqlens.numel() - 1, "[N, D]")
        _check_state("initial_state", initial_state, x, layout, (rows, x.shape[2]))
    if (group := active_group()) is not None:
        options = {"initial_state": initial_state, "output_final_state": output_final_state, "reverse": reverse}
        return linear_scan_segment(linear_scan, group, x, decay, **options, cu_seqlens=cu_seqlens, backend=backend)
    backend = choose(backend, _real(x))
    inputs = (x, decay, initial_state, cu_seqlens, reverse)
    h, final_state = linear_scan_reference(*inputs) if backend == "reference" else op.linear_scan(*inputs, backend)
    return h.to(x.dtype), final_state if output_final_state else None


@torch.no_grad()
def linear_scan_step(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    r"""One step of `linear_scan`; the state is updated in place, at its address.

        h <- a * h + x

    Args:
        x: `[B, D]`, real or complex.
        decay: a `[B, D]`, real if x is and complex if x is.
        state: h `[B, D]`, float32 or float64 (complex64 or complex128 if x is complex). Overwritten.

    Returns:
        h in the dtype of x. No gradient flows: train with `linear_scan`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    refuse_steps("linear_scan_step")
    _check_arguments(x, decay, "[B, D]")
    check_tensor("state", state, COMPLEX if x.is_complex() else (torch.float32, torch.float64))
    _check_state("state", state, x, "[B, D]", tuple(x.shape))
    backend = choose("auto", _real(x), ("auto", "triton", "torch"), unsupported=_why_no_step(state))
    return op.scans(backend).linear_scan_step(x, decay, state)


def _real(x: Tensor) -> Tensor:
    """A tensor of the device and precision of x."""
    return x.real if x.is_complex() else x


def _why_no_step(state: Tensor) -> str | None:
    if _real(state).dtype == torch.float64:
        return "linear_scan_step writes states of single precision"
    return "linear_scan_step writes no state that is lazily conjugated" if state.is_conj() else None


def _check_arguments(x: Tensor, decay: Tensor, layout: str) -> None:
    check_tensor("x", x, FLOATS + COMPLEX)
    check_shape("x", x, layout, (-1,) * layout.count(",") + (-1,))
    check_tensor("decay", decay, COMPLEX if x.is_complex() else FLOATS)
    check_shape("decay", decay, layout, tuple(x.shape))
    check_same("decay", decay, "x", x, dtype=False)


def _check_state(name: str, state: Tensor, x: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    check_tensor(name, state, COMPLEX if x.is_complex() else FLOATS)
    check_shape(name, state, layout, shape)
    check_same(name, state, "x", x, dtype=False)
