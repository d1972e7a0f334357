"""The input-dependent decay of selective state spaces, which Mamba-2, Gated DeltaNet and KDA share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.modules.init import fill_


class SoftplusDecay(nn.Module):
    r"""log a = -exp(A_log) dt,   dt = softplus(x + dt_bias)   (Gu and Dao 2023, arXiv 2312.00752).

    Initially exp(A_log) is uniform in `rates` and softplus(dt_bias) log-uniform in [0.001, 0.1], as in the authors'
    code. Everything in float32 at least; weight decay leaves both parameters alone (by their names).

    Args:
        num_heads: H; A_log is `[H]`.
        channels: K, if each channel of a head has its own decay: dt_bias is then `[H, K]`, else `[H]`.
        rates: lowest and highest exp(A_log) at the start.
    """

    def __init__(self, num_heads: int, channels: int | None = None, *, rates: tuple[float, float] = (1.0, 16.0)):
        super().__init__()
        self.rates = rates
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads if channels is None else (num_heads, channels)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        rate = torch.empty_like(self.A_log).uniform_(*self.rates)
        fill_(self.A_log, rate.clamp(min=1e-4).log())  # log 0 would be -inf for good
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        fill_(self.dt_bias, dt + (-torch.expm1(-dt)).log())  # the inverse of softplus, exact also for small dt

    def time_step(self, x: Tensor) -> Tensor:
        """dt of x `[B, T, H]`, or `[B, T, H, K]` with channels."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.softplus(x.to(dtype) + self.dt_bias.to(dtype))

    def log_decay(self, dt: Tensor) -> Tensor:
        """log a of the time step `dt`."""
        rate = self.A_log.to(dt.dtype).exp()
        return -dt * (rate if self.dt_bias.dim() == 1 else rate[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """log a of x."""
        return self.log_decay(self.time_step(x))
