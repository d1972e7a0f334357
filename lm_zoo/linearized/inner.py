"""Inner mixers: what stands in the place of softmax(q k^T) v inside the attention of a pretrained transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_zoo.config import suggest
from lm_zoo.layers import LayerState

GEOMETRY = ("num_heads", "num_kv_heads", "head_size", "scale", "hidden_size")  # what the teacher decides


@dataclass
class Context:
    """What one forward call of the whole model tells its attention layers.

    Attributes:
        states: one per layer, `None` without a cache.
        cu_seqlens: `[N + 1]` borders of N texts packed along time (then B = 1, and states have N rows), or `None`.
        hidden: the input of the attention layer at work, `[B, T, hidden_size]`.
        rotary: cos and sin, `[B or 1, T, R]`, which that layer turned q and k by; `None` where it does not.
        observer: called in place of every attention, kept or replaced, as `observer(module, q, k, v, context)`; what it
            returns, `[B, T, H, D]`, goes on. `module.mixer` is the layer's inner mixer, `None` where softmax is kept.
    """

    states: list[LayerState] | None = None
    cu_seqlens: Tensor | None = None
    hidden: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    observer: Callable[[nn.Module, Tensor, Tensor, Tensor, Context], Tensor] | None = None

    def state_of(self, module: nn.Module) -> LayerState | None:
        """The state of an attention module."""
        return None if self.states is None else self.states[module.layer_idx]


class InnerMixer(nn.Module):
    """Base of the inner mixers.

        y = mixer(q, k, v, context=context, state=None, cu_seqlens=None)

    Any split of a text into calls with a state gives the result of one call, as with every `Mixer`; with `state` and
    `cu_seqlens` together the state has N rows and each packed text continues its own. A mixer initialises itself in its
    constructor and has no buffers but such as are saved.

    Args:
        num_heads: H, heads of q.
        num_kv_heads: HKV, heads of k and v, a divisor of H: query head h goes with head h // (H / HKV).
        head_size: D, channels per head of q, k and v alike.
        scale: what the teacher multiplies q . k by.
        hidden_size: width of `context.hidden`.

    A subclass adds its options as keyword arguments, checks them at once, and is entered in `INNER_MIXERS`.
    """

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_size: int, scale: float, hidden_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.hidden_size = hidden_size

    @classmethod
    def options(cls) -> list[str]:
        """The names of the keyword arguments that are not the teacher's to decide."""
        return [name for name in inspect.signature(cls).parameters if name not in GEOMETRY]

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state before the first token; `dtype` is the activations'."""
        raise NotImplementedError(f"{type(self).__name__} does not define init_state")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, context: Context, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The heads' outputs `[B, T, H, D]`, before the teacher's output projection.

        Args:
            q: `[B, T, H, D]`, after the teacher's biases, norms and rotary positions, not yet scaled.
            k, v: `[B, T, HKV, D]`.
            context: what else there is to know of the call; its `states` are those of all layers.
            state: of this layer, updated in place.
            cu_seqlens: `[N + 1]`, with B = 1.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


# Filled by the modules that define them, which lm_zoo/linearized/__init__.py imports.
INNER_MIXERS: dict[str, type[InnerMixer]] = {}


def mixer_class(name: str) -> type[InnerMixer]:
    """The inner mixer of that name."""
    if name not in INNER_MIXERS:
        raise ValueError(f"mixer must be an inner mixer of lm_zoo, got {name!r}{suggest(str(name), INNER_MIXERS)}")
    return INNER_MIXERS[name]


def check_options(name: str, options: dict) -> None:
    """Whether the mixer `name` knows all of the options; what values it takes it says itself when it is built."""
    if not isinstance(options, dict):
        raise TypeError(f"mixer_options must hold keyword arguments of the mixer {name!r}, got {options!r}")
    known = mixer_class(name).options()
    for option in options:
        if option in GEOMETRY:
            raise ValueError(f"mixer_options must not have {option!r}: the teacher decides it")
        if option not in known:
            raise ValueError(f"unknown option {option!r} for the mixer {name!r}{suggest(str(option), known)}")
