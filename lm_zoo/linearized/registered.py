"""The mixers of `lm_zoo.layers` between the projections of a pretrained transformer."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lm_zoo.layers import MIXERS, LayerState
from lm_zoo.layers.checks import check_flag, check_texts
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.linearized.inner import INNER_MIXERS, Context, InnerMixer
from lm_zoo.linearized.liger import turn_back
from lm_zoo.modules.short_conv import ShortConvolution

OF_THE_MODEL = ("hidden_size", "layer_index", "num_layers")  # arguments of a layer that are not for the user to choose


class RegisteredMixer(InnerMixer):
    r"""A mixer of the registry with queries, keys and values, between the teacher's projections of them.

        y_n = s * mix(q, k, v, x)_n        s per head and channel

    q, k and v are the teacher's, keys and values repeated for the query heads that share them; x is the input of the
    attention layer, of which the mixer makes its gates. The mixer's heads are the teacher's, with K = V = D. It has new
    parameters for all but the projections, and starts as little more than its recurrence: the convolution hands each
    token on as it is, the output gate is the same for all tokens, Mamba-2's D is 0, and `match_norm` sets s.

    Args:
        rotary: whether q and k keep the teacher's rotary positions.
        silu: whether the convolution is followed by a SiLU, as in models that are trained from nothing; only of a mixer
            that has a convolution.
        options: the mixer's own.

    The state is the mixer's, for H heads.
    """

    layer_class: ClassVar[type[QKVMixer]]

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        hidden_size: int,
        rotary: bool = True,
        silu: bool = False,
        **options: Any,
    ):
        super().__init__(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=scale,
            hidden_size=hidden_size,
        )
        check_flag("rotary", rotary)
        check_flag("silu", silu)
        self.rotary = rotary
        if silu and "silu" not in self.options():
            raise ValueError("silu must be false: this mixer has no convolution for it to follow")
        self.layer = self.layer_class.between_projections(hidden_size, num_heads, head_size, **options)
        self.output_scale = nn.Parameter(torch.ones(num_heads, head_size))
        pass_through(self.layer, silu)

    @classmethod
    def options(cls) -> list[str]:
        own = inspect.signature(cls.layer_class).parameters
        decided = {*cls.layer_class.sizes(1, 1, 1), *OF_THE_MODEL}
        return ["rotary", *(["silu"] if "conv_size" in own else []), *(name for name in own if name not in decided)]

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LayerState:
        return self.layer.init_state(batch_size, device=device, dtype=dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, context: Context, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        check_texts(q, state, cu_seqlens)
        given, dtype = q.dtype, self._dtype(q.device)
        if not self.rotary:
            both = turn_back(torch.cat([q, k], dim=2), context.rotary)
            q, k = both.split_with_sizes((self.num_heads, self.num_kv_heads), dim=2)
        k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for y in (k, v))
        q, k, v = (y.to(dtype).flatten(2) for y in (q, k, v))
        y = self.layer.mix(q, k, v, context.hidden.to(dtype), state=state, cu_seqlens=cu_seqlens)
        return (y.unflatten(-1, self.output_scale.shape) * self.output_scale).to(given)

    def _dtype(self, device: torch.device) -> torch.dtype:
        """What the mixer computes in: while it is trained its parameters are wider than the teacher's."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.output_scale.dtype

    @torch.no_grad()
    def match_norm(self, ratio: Tensor) -> None:
        """Multiply the output's scale by `ratio` `[H]`: how much larger the teacher's outputs are, per head."""
        self.output_scale.mul_(ratio[:, None])


def pass_through(layer: QKVMixer, silu: bool) -> None:
    """Hand each token on as it is, open the output gate alike for all of them, and add nothing to the state's part."""
    for module in layer.modules():
        if isinstance(module, ShortConvolution):
            module.silu = silu
            nn.init.zeros_(module.weight[:, :-1])
            nn.init.ones_(module.weight[:, -1])
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    gate = getattr(layer, "gate_proj", None)
    if gate is not None:
        last = gate[-1] if isinstance(gate, nn.Sequential) else gate
        last.bias = nn.Parameter(torch.ones_like(last.weight[:, 0]))
        nn.init.zeros_(last.weight)
    if hasattr(layer, "D"):  # of Mamba-2: at D = 1 the state's part would drown before the norm
        nn.init.zeros_(layer.D)


def register(name: str, layer_class: type[QKVMixer]) -> None:
    """Make a layer the inner mixer of that name."""
    INNER_MIXERS[name] = type(layer_class.__name__, (RegisteredMixer,), {"layer_class": layer_class})


for _name, _class in MIXERS.items():
    if issubclass(_class, QKVMixer):
        register(_name, _class)
