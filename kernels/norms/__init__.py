"""Norms of the last dimension, with what usually follows them fused in.

    rms_norm:  y = x / sqrt(mean(x^2) + eps) * weight [* silu(gate)]        l2_norm:  y = x / sqrt(sum(x^2) + eps)

In PyTorch (`torch_norms.py`) and in Triton (`triton_norms.py`), where both are one kernel.
"""

from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import check_same, check_shape, check_tensor
from lm_zoo.kernels.norms.torch_norms import l2_norm_torch, rms_norm_torch

__all__ = ["l2_norm", "rms_norm"]

BACKENDS = ("auto", "triton", "torch")
MAX_SIZE = 16384  # of the last dimension, which the Triton kernel keeps in registers


def rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None = None, *, eps: float, backend: str = "auto") -> Tensor:
    r"""Root-mean-square norm (Zhang and Sennrich 2019), and the output gate of most recurrences.

        y = x / sqrt(mean(x^2) + eps) * weight        and with a gate   y * silu(gate)

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        gate: in the shape of x.
        eps: added to the mean square.
        backend: "auto", "triton" or "torch".

    Returns:
        y in the shape and dtype of x, computed in float32 at least.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if weight.shape != x.shape[-1:]:
        check_shape("weight", weight, "[D]", tuple(x.shape[-1:]))
    check_same("weight", weight, "x", x, dtype=False)
    if gate is not None:
        check_tensor("gate", gate)
        if gate.shape != x.shape:
            check_shape("gate", gate, "as x", tuple(x.shape))
        check_same("gate", gate, "x", x, dtype=False)
    if choose(backend, x, BACKENDS, unsupported=_not_in_triton(x, weight)) == "triton":
        from lm_zoo.kernels.norms.triton_norms import norm_forward

        return norm_forward(x, weight, gate, eps, True)
    return rms_norm_torch(x, weight, gate, eps)


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    r"""x / sqrt(sum(x^2) + eps) over the last dimension: unit length, but zero stays zero.

    Args:
        x: `[..., D]`.
        eps: added to the squared length.
        backend: "auto", "triton" or "torch".

    Returns:
        y in the shape and dtype of x, computed in float32 at least.
    """
    check_tensor("x", x)
    if choose(backend, x, BACKENDS, unsupported=_not_in_triton(x, x)) == "triton":
        from lm_zoo.kernels.norms.triton_norms import norm_forward

        return norm_forward(x, None, None, eps, False)
    return l2_norm_torch(x, eps)


def _not_in_triton(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[-1] > MAX_SIZE:
        return f"its kernels take D up to {MAX_SIZE}, got D = {x.shape[-1]}"
    if weight.element_size() == 8:
        return "its kernels compute in float32, weight is float64"
    return None
