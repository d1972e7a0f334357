"""Root-mean-square norm over the last dimension, plain or followed by a gate."""

import torch
from torch import Tensor, nn

from lm_zoo.kernels import rms_norm


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
        return rms_norm(x, self.weight, gate, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"
