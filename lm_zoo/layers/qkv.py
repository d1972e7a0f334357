"""What the mixers with queries, keys and values have in common: projections around what mixes along time."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.checks import check_input


class QKVMixer(Mixer):
    """Base of the mixers y = W_o mix(W_q x, W_k x, W_v x, x).

    What stands between the projections can be had alone, for a transformer's own projections: `between_projections`
    builds it, and `mix` is its forward pass. A subclass makes q_proj, k_proj, v_proj and o_proj, and defines `mix` and
    `sizes`.
    """

    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        o = self.mix(self.q_proj(x), self.k_proj(x), self.v_proj(x), x, state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(o)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """From q and k `[B, T, H K]`, v `[B, T, H V]` and the layer's input x to what W_o takes, `[B, T, H V]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix")

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        """The constructor's keyword arguments, beside hidden_size, for heads of K = V = head_size channels."""
        raise NotImplementedError(f"{cls.__name__} does not define sizes")

    @classmethod
    def between_projections(cls, hidden_size: int, num_heads: int, head_size: int, **options: Any) -> QKVMixer:
        """A layer without projections, whose `mix` alone can be called; `options` are the constructor's others."""
        layer = cls(hidden_size, **cls.sizes(hidden_size, num_heads, head_size), **options)
        for name in cls.projections:
            delattr(layer, name)
        return layer
