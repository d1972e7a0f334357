"""The way in: transformers hands q, k and v of every attention layer to the function registered here as "lm_zoo".

It gets them after rotary positions, norms of q and k and the split of fused projections, before the key and value heads
are repeated and before the output projection. What else a layer needs travels as one extra keyword argument, `lm_zoo`,
which the supported families pass down to their attention.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lm_zoo.layers.kv_state import softmax_attention
from lm_zoo.linearized.inner import Context, InnerMixer

NAME = "lm_zoo"


def attach(module: nn.Module, mixer: InnerMixer | None, window: int | None) -> None:
    """Make a transformers attention module one of ours: with an inner mixer, or with its softmax kept.

    `window` is how many tokens its softmax sees, `None` for all.
    """
    module.register_module("mixer", mixer)
    module.softmax_window = window
    module.register_forward_pre_hook(tell_context, with_kwargs=True)


def hold_rotary(rotary: nn.Module) -> None:
    """Keep rotary angles that depend on the length of the text ("dynamic", "longrope") as they are for short ones.

    transformers chooses them by the longest text of each call: how a text is cut into calls would change its result.
    """
    kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        rotary.forward = functools.partial(torch.no_grad()(inspect.unwrap(type(rotary).forward)), rotary)
        for name in [name for name, _ in rotary.named_buffers() if name.endswith("original_inv_freq")]:
            setattr(rotary, name.replace("original_", ""), getattr(rotary, name).clone())
        rotary.max_seq_len_cached = rotary.original_max_seq_len  # the longest text that these angles are for


def release_rotary(rotary: nn.Module) -> None:
    """Undo `hold_rotary`."""
    vars(rotary).pop("forward", None)


def tell_context(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Note the input of the attention layer at work, and its rotary positions, in the context."""
    context = kwargs.get("lm_zoo")
    if context is not None:
        context.hidden = args[0] if args else kwargs["hidden_states"]
        # SmolLM3 hands the positions to all layers, and some of them do not turn q and k.
        context.rotary = kwargs.get("position_embeddings") if getattr(module, "use_rope", True) else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lm_zoo: Context | None = None,
    **of_the_family,
) -> tuple[Tensor, None]:
    """transformers' attention function: `[B, heads, T, D]` in, `[B, T, H, D]` out.

    The mask is always `None`: padding is packed away, and texts and windows are bounded by us. Dropout of attention
    weights is left out, in kept layers as well: replaced ones have no weights.
    """
    if lm_zoo is None:
        raise ValueError(
            "this transformer is the inside of a LinearizedForCausalLM: call that one, or its as_teacher() for the "
            "softmax attention"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if lm_zoo.observer is not None:
        o = lm_zoo.observer(module, q, k, v, lm_zoo)
    elif module.mixer is None:
        o = softmax(module, q, k, v, lm_zoo)
    else:
        o = module.mixer(q, k, v, context=lm_zoo, state=lm_zoo.state_of(module), cu_seqlens=lm_zoo.cu_seqlens)
    return o.to(query.dtype).contiguous(), None


def softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """The teacher's own attention, `[B, T, H, D]`: causal, with the layer's scale and window.

    With a state (a kept layer's) it continues the texts. In a replaced layer it takes none: for the whole text at once.
    """
    o = softmax_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        window=module.softmax_window,
        scale=module.scaling,
        state=None if module.mixer is not None else context.state_of(module),
        cu_seqlens=context.cu_seqlens,
    )
    return o.transpose(1, 2)


# Not with AttentionMaskInterface: for a name that is not in there transformers builds no mask at all, where else it
# would first compare all positions to find packed texts.
AttentionInterface.register(NAME, attention)
