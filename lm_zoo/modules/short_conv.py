"""The short causal convolution in front of most recurrences: what n-grams need of the past, and its state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_zoo.kernels import causal_conv1d

if TYPE_CHECKING:
    from lm_zoo.layers.base import LayerState


class ShortConvolution(nn.Module):
    r"""y_t = silu(sum_{w < W} weight[:, w] * x_{t - W + 1 + w} + bias), each channel by itself.

    Continues from `state["conv"]`, the last W - 1 inputs, `[B, D, W - 1]`, and leaves its own last inputs there.
    Initialised as `nn.Conv1d`.

    Args:
        channels: D.
        size: W, taps of the filter of each channel.
        bias: whether there is one.
        silu: whether there is a SiLU.
    """

    def __init__(self, channels: int, size: int = 4, *, bias: bool = False, silu: bool = True):
        super().__init__()
        self.channels = channels
        self.size = size
        self.silu = silu
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros, as if nothing had been before."""
        return torch.zeros(batch_size, self.channels, self.size - 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        if state is not None and state.journal is not None:
            state.record("conv", self._shift, x)
        past = None if state is None else state.writable("conv")
        activation = "silu" if self.silu else None
        return causal_conv1d(x, self.weight, self.bias, activation=activation, state=past, cu_seqlens=cu_seqlens)

    def _shift(self, x: Tensor, *, state: LayerState) -> None:
        """What x leaves of itself in the state."""
        inputs = torch.cat([state["conv"], x.mT.to(state["conv"].dtype)], dim=-1)
        state.write("conv", inputs[..., inputs.shape[-1] - self.size + 1 :])

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, bias={self.bias is not None}, silu={self.silu}"
