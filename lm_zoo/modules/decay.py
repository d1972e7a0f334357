"""The input-dependent decays of selective state spaces, positive (Mamba-2, Gated DeltaNet, KDA) or of either sign."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels.sequence_parallel import Product, Segment, SequenceGroup, active_group, scan_ranks
from lm_zoo.modules.init import fill_

if TYPE_CHECKING:
    from lm_zoo.layers.base import LayerState


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

    def of(self, dt: Tensor) -> Tensor:
        """log a of the time step `dt`."""
        rate = self.A_log.to(dt.dtype).exp()
        return -dt * (rate if self.dt_bias.dim() == 1 else rate[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """log a of x."""
        return self.of(self.time_step(x))


def stretched(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Of the decay a = 2 exp(g) - 1 in (-1, 1]: log |a|, and where a < 0."""
    decay = log_decay.exp()
    # |a| = 1 - 2 min(1 - e^g, e^g), without cancellation at both ends. In between a may come out as 0, where log |a|
    # and its slope are infinite; the nearest |a| that differs from 0 is as near as the rounding of e^g.
    shrink = torch.minimum(-torch.expm1(log_decay), decay).clamp(max=0.5 - torch.finfo(decay.dtype).eps / 4)
    return torch.log1p(-2 * shrink), decay < 0.5


def running_sign(negative: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
    """The product of the signs of the decays up to t, `[B, T, H]`; `state["flips"]` `[B, H]` counts on, modulo two.

    Without a state, what came before a document may leave its sign there: the caller puts it on the values and takes
    it off the outputs.
    """
    if state is not None and state.journal is not None:
        state.record("flips", functools.partial(running_sign, cu_seqlens=None), negative)
    flips = negative.cumsum(dim=1)
    if (group := active_group()) is not None:
        return _sign_of_segment(flips, state, cu_seqlens, group)
    if state is not None and cu_seqlens is None:
        flips = flips + state["flips"][:, None]
        state.write("flips", flips[:, -1] % 2)
    elif state is not None:
        before = F.pad(flips[0], (0, 0, 1, 0))  # [T + 1, HV]
        offset = state["flips"] - before[cu_seqlens[:-1]]  # [N, HV]
        state.write("flips", (before[cu_seqlens[1:]] + offset) % 2)
        document = torch.searchsorted(cu_seqlens, torch.arange(flips.shape[1], device=flips.device), right=True) - 1
        flips = flips + offset[document]
    return 1 - 2 * (flips % 2)


@torch.compiler.disable
def _sign_of_segment(
    flips: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, group: SequenceGroup
) -> Tensor:
    """`running_sign` of the flips that were counted within a segment."""
    segment = Segment(group, flips.shape[1], cu_seqlens, flips.device)
    carried = scan_ranks(group, None, flips[:, -1] % 2, None, Product).result()
    flips = flips + carried[:, None]
    if state is not None and cu_seqlens is None:
        flips = flips + state["flips"][:, None]
        state.write("flips", segment.final(flips[:, -1] % 2))
    elif state is not None:
        # What all segments counted before each border, of which the segment that it lies in knows.
        place, length = cu_seqlens - segment.offset, segment.length + (group.rank == group.size - 1)
        here = torch.cat([carried, flips[0]])[place.clamp(0, segment.length)]
        before = group.sum(torch.where(((place >= 0) & (place < length))[:, None], here, 0))
        offset = state["flips"] - before[:-1]
        state.write("flips", (before[1:] + offset) % 2)
        tokens = segment.offset + torch.arange(segment.length, device=flips.device)
        flips = flips + offset[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
    return 1 - 2 * (flips % 2)
