"""Root-mean-square norm over the last dimension, plain or followed by a gate; and the plain length."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    r"""y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), and with a gate y * silu(gate).

    Normalises the last dimension, `[..., D]`; on `[B, T, H, V]` that is the per-head norm of RetNet and GLA. Computed
    in float32 at least, returned in the dtype of x.
    """

    def __init__(self, size: int, *, eps: float = 1e-6):
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), (self.size,), self.weight.to(dtype), self.eps)
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension: unit length, but zero stays zero. In float32 at least."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype)
