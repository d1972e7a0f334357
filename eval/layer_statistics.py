"""How fast the layers of a model forget, and how large their states are, when it reads a text.

A dispatch mode looks at the decays that go into the recurrences, so that no layer has to know of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lm_zoo.causal_lm import CausalLM
from lm_zoo.layers import S4D, Mixer

BLOCK = 64  # tokens whose decays are formed at a time, where they are as many as the state's numbers


@torch.no_grad()
def layer_statistics(
    model: CausalLM, tokens: Tensor, *, gather: Callable[[Tensor], Tensor] | None = None
) -> list[dict[str, Any]]:
    """Of each recurrent layer, when the model reads tokens `[1, T]` from empty states.

    mean_decay: the mean over tokens and channels (or heads) of |a_t|, by which a state shrinks in a token.
    memory_length: tokens after which a channel has forgotten most, 1 / (1 - mean over time of |a_t|); the median over
        the channels, inf where nothing is forgotten. What a delta rule overwrites does not count as forgotten.
    state_norm: the Euclidean norm of the state after the last token.

    Where ranks share the heads of layers, all of them call this, and `gather` makes one vector of what each has.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    cache = model.init_cache(1)
    with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled again, for one text
        model(tokens, past_key_values=cache, logits_to_keep=1)
    layers = []
    for index, forgotten in forgotten_per_token(model, tokens).items():
        state = cache.states[index]
        norm = torch.linalg.vector_norm(state["S" if "S" in state else "h"])
        if mixers[index].ranks > 1:
            forgotten, norm = gather(forgotten), gather(norm[None]).norm()
        layers.append(
            {
                "layer": index,
                "mixer": type(mixers[index]).__name__,
                "mean_decay": 1 - forgotten.mean().item(),
                "memory_length": 1 / forgotten.median().item() if forgotten.median() > 0 else float("inf"),
                "state_norm": norm.item(),
            }
        )
    return layers


@torch.no_grad()
def forgotten_per_token(model: CausalLM, tokens: Tensor) -> dict[int, Tensor]:
    """1 - the mean over tokens of |a_t|, of every channel (or head), by the number of the recurrent layer."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    with torch.compiler.set_stance("force_eager"), Decays().of_layers(mixers) as decays:
        model(tokens, logits_to_keep=1)  # without a cache, with which a few tokens go another way than by the op
    forgotten = {}
    for index, mixer in enumerate(mixers):
        if not {"S", "h"} & set(mixer.init_state(1)):
            continue
        if isinstance(mixer, S4D):  # the same at every token, so no op is told
            decay = mixer.discrete(torch.complex64)[0].real.exp()
            decays[index] = decay.full_tensor() if isinstance(decay, DTensor) else decay
        decay = decays.get(index)
        forgotten[index] = torch.zeros(1) if decay is None else (1 - decay.flatten().double()).clamp(min=0)
    return forgotten


class Decays(TorchDispatchMode):
    """The mean over time of the decays that each layer hands to its op, by the layer's number."""

    def __init__(self) -> None:
        super().__init__()
        self._means: dict[int, Tensor] = {}
        self._layer = -1

    @contextlib.contextmanager
    def of_layers(self, mixers: list[Mixer]) -> Iterator[dict[int, Tensor]]:
        def enter(index: int):
            def hook(*_: Any) -> None:
                self._layer = index

            return hook

        handles = [mixer.register_forward_pre_hook(enter(index)) for index, mixer in enumerate(mixers)]
        try:
            with self:
                yield self._means
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        mean = MEANS.get(func)
        if mean is not None:
            decay = mean(*args)
            if decay is not None:
                self._means[self._layer] = decay
        return func(*args, **(kwargs or {}))


def _of_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *_: Any) -> Tensor | None:
    return None if log_decay is None else log_decay.double().exp().mean(dim=(0, 1))


def _of_linear_scan(x: Tensor, decay: Tensor, *_: Any) -> Tensor:
    return decay.abs().double().mean(dim=(0, 1))


def _of_selective_scan(x: Tensor, dt: Tensor, A: Tensor, *_: Any) -> Tensor:
    blocks = (block[..., None].double().mul(A).exp().sum(dim=(0, 1)) for block in dt.split(BLOCK, dim=1))
    return sum(blocks) / (dt.shape[0] * dt.shape[1])


MEANS = {
    torch.ops.lm_zoo.linear_attention.default: _of_linear_attention,
    torch.ops.lm_zoo.linear_scan.default: _of_linear_scan,
    torch.ops.lm_zoo.selective_scan.default: _of_selective_scan,
}
