"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) at any position of any row.

Nothing is kept in buffers: a table would have to grow with the longest text, and `model.bfloat16()` would round it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_zoo.kernels.sequence_parallel import active_group
from lm_zoo.modules.init import fill_

if TYPE_CHECKING:
    from lm_zoo.layers.base import LayerState


def token_positions(
    length: int, start: Tensor | None = None, cu_seqlens: Tensor | None = None, *, device: torch.device
) -> Tensor:
    """The position of every token in its own text: `[B or 1, T]`, int64.

    Args:
        length: T.
        start: tokens that each row has seen before, `[B]`, or `[N]` with `cu_seqlens`; zero if not given.
        cu_seqlens: `[N + 1]` borders of the N documents packed along time; each counts on its own.
    """
    steps = torch.arange(length, device=device)
    if (group := active_group()) is not None:  # the tokens are a segment of the text, of which `cu_seqlens` is all
        steps = steps + group.rank * length
    if cu_seqlens is None:
        return steps[None] if start is None else start[:, None] + steps
    document = torch.searchsorted(cu_seqlens, steps, right=True) - 1  # `right`: empty documents own no token
    positions = steps - cu_seqlens[document]
    return (positions if start is None else positions + start[document])[None]


def advance(x: Tensor, state: LayerState, cu_seqlens: Tensor | None = None) -> None:
    """Count the tokens of x `[B, T, ...]` into `state["position"]` `[B or N]`."""
    if state.journal is not None:
        state.record("position", advance, x)
    length = x.shape[1] if (group := active_group()) is None else x.shape[1] * group.size
    state["position"].add_(length if cu_seqlens is None else cu_seqlens.diff())


def rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0) -> Tensor:
    r"""Rotate channel pairs (d, d + K/2) of x at position p by the angle p * base^(-2d / K).

    The dot product of a rotated query and a rotated key depends on the distance of their positions only.

    Args:
        x: `[B, T, H, K]`, K even.
        positions: `[B or 1, T]`.
    """
    pairs = x.shape[-1] // 2
    # In float64: a float32 angle at position 100,000 is off by up to 0.004 radians. (MPS has no float64.)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    frequencies = torch.logspace(0, 1 / pairs - 1, pairs, base=base, device=x.device, dtype=wide)
    angles = (positions[..., None] * frequencies)[:, :, None]  # [B or 1, T, 1, K/2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    left, right = x.to(dtype).chunk(2, dim=-1)
    turned = [torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)]
    return torch.cat(turned, dim=-1).to(x.dtype)


class LearnedRotary(nn.Module):
    r"""LRPE of TransNormer (Qin et al. 2022, arXiv 2210.10340): x at position p is [x cos(p theta), x sin(p theta)].

    The dot product of two such is sum_d q_d k_d cos(theta_d (t - s)): twice the channels, and every channel has its own
    angle, learned, at first 10000^(-2j / (H K)) over the channels of all heads.
    """

    def __init__(self, num_heads: int, size: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float32)
        fill_(self.theta, (10000.0 ** (-2 / len(channels) * channels)).view_as(self.theta))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`[B, T, H, K]` and `[B or 1, T]` to `[B, T, H, 2 K]`."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # as in `rotary`
        angles = positions[..., None, None] * self.theta.to(wide)
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat([x * cos, x * sin], dim=-1).to(x.dtype)
