"""The gated convolution that takes turns with the mixer in the models that recall is published with."""

from __future__ import annotations

from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.model import ZooForCausalLM
from lm_zoo.modules.short_conv import ShortConvolution


class GatedConvolution(Mixer):
    """y = x + conv(x) * (W x + b), the convolution over `size` tokens, of each channel by itself.

    BaseConv of Arora et al. 2023 (zoology, arXiv 2312.04927). In the first block it brings each key to its value, so
    that a mixer in the second one can write and find pairs, and needs no short convolution of its own.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.conv = ShortConvolution(hidden_size, size, bias=True, silu=False)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        return LayerState({"conv": self.conv.init_state(batch_size, *self._placement(device, dtype))})

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        return x + self.conv(x, state, cu_seqlens) * self.proj(x)


def put_convolutions_between(model: ZooForCausalLM, size: int) -> None:
    """In place of the mixer of every other block of a new model, from the first."""
    for block in model.model.layers[::2]:
        block.mixer = GatedConvolution(model.config.hidden_size, size)
        nn.init.normal_(block.mixer.proj.weight, std=model.config.initializer_range)
        nn.init.zeros_(block.mixer.proj.bias)
