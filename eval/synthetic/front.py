"""The short convolution in front of every mixer that recall tasks are published with."""

from __future__ import annotations

from torch import Tensor

from lm_zoo.kernels import causal_conv1d
from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.model import ZooForCausalLM
from lm_zoo.modules.short_conv import ShortConvolution


class ConvolutionFirst(Mixer):
    """y = mixer(conv(x)), the convolution over `size` tokens, of each channel by itself, without an activation.

    With it no mixer has to spend a layer on bringing a key to its value (zoology, Arora et al. 2023, arXiv 2312.04927).
    """

    def __init__(self, mixer: Mixer, hidden_size: int, size: int):
        super().__init__()
        self.conv = ShortConvolution(hidden_size, size, silu=False)
        self.mixer = mixer

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        state = self.mixer.init_state(batch_size, device=device, dtype=dtype)
        state.tensors["front"] = self.conv.init_state(batch_size, device=device, dtype=dtype)
        return state

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        past = None if state is None else state.writable("front")
        x = causal_conv1d(x, self.conv.weight, self.conv.bias, state=past, cu_seqlens=cu_seqlens)
        return self.mixer(x, state=state, cu_seqlens=cu_seqlens)


def put_convolutions_first(model: ZooForCausalLM, size: int) -> None:
    """In front of the mixer of every block of a new model."""
    for block in model.model.layers:
        block.mixer = ConvolutionFirst(block.mixer, model.config.hidden_size, size)
