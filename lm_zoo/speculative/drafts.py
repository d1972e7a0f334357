"""Who guesses the next tokens: a smaller model, the model's own first layers, or the text itself."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.model import ZooForCausalLM
from lm_zoo.speculative.acceptance import Sampling
from lm_zoo.speculative.calls import Calls


class Draft(Protocol):
    """Guesses for the texts of a batch, round by round."""

    def guess(self, texts: list[list[int]], count: int) -> tuple[Tensor, Tensor | None]:
        """At most `count` tokens to follow each text, `[B, K]`, and what they were drawn from, `[B, K, V]`, if at all.

        texts: all tokens of each row so far.
        """

    def settle(self, counts: list[int]) -> None:
        """Row n goes on with `counts[n]` tokens, the first `counts[n]` - 1 guesses and another one; 0: it is over."""


class ModelDraft:
    """A model guesses token by token. Its cache has read all of each text but the last `pending` tokens."""

    def __init__(self, model: CausalLM, cache: ZooCache, sampling: Sampling, generator: torch.Generator | None):
        self.model, self.cache = model, cache
        self.calls = Calls(model, cache)
        self.sampling, self.generator = sampling, generator
        self.pending = 1
        self.guessed = 0

    def guess(self, texts, count):
        unread = torch.tensor([text[-self.pending :] for text in texts], device=self.model.device)
        self.calls.record()
        tokens, drawn_from = [], []
        for _ in range(count):
            token, q = self.sampling.draw(self.calls(unread)[:, -1], self.generator)
            unread = token[:, None]
            tokens.append(token)
            drawn_from.append(q)
        self.guessed = count
        return torch.stack(tokens, dim=1), None if self.sampling.greedy else torch.stack(drawn_from, dim=1)

    def settle(self, counts):
        # It has not read its last guess. Where that stays, its row has two tokens to read, and so has then every row.
        pending = 2 if max(counts) > self.guessed else 1
        self.calls.keep([max(0, self.pending + count - pending) for count in counts])
        self.pending = pending


class EarlyLayers:
    """The first layers of a model guess, from the very states that they have in its own cache."""

    def __init__(self, model: ZooForCausalLM, cache: ZooCache, layers: int, sampling: Sampling, generator):
        self.cache = cache
        shorter = early_exit(model, layers)
        self.draft = ModelDraft(shorter, ZooCache(cache.states[:layers], model=shorter), sampling, generator)

    def guess(self, texts, count):
        self.draft.cache.length = self.cache.length
        guesses = self.draft.guess(texts, count)
        self.draft.calls.keep([0] * len(texts))  # the model reads them again, with all of its layers
        return guesses

    def settle(self, counts):
        pass


class Lookup:
    """What followed the last tokens of a text, up to `size` and better more, where they stood before."""

    def __init__(self, texts: list[list[int]], size: int, device: torch.device):
        self.size = size
        self.device = device
        self.seen: list[dict[tuple[int, ...], int]] = [{} for _ in texts]  # tokens to the place after them
        self.read = [0] * len(texts)

    def guess(self, texts, count):
        found = [self._continued(row, text, count) for row, text in enumerate(texts)]
        longest = max(map(len, found))
        # Any token is a guess that does no harm where there is none: it stays only if the model says so.
        found = [guess + [0] * (longest - len(guess)) for guess in found]
        return torch.tensor(found, dtype=torch.int64, device=self.device).view(len(texts), longest), None

    def _continued(self, row: int, text: list[int], count: int) -> list[int]:
        seen = self.seen[row]
        for end in range(max(1, self.read[row]), len(text)):
            for size in range(1, min(self.size, end) + 1):
                seen[tuple(text[end - size : end])] = end
        self.read[row] = len(text)
        for size in range(min(self.size, len(text)), 0, -1):
            start = seen.get(tuple(text[-size:]))
            if start is not None:
                period = text[start:]  # goes on into the guess itself, where the text repeats itself
                return [period[i % len(period)] for i in range(count)]
        return []

    def settle(self, counts):
        pass


def early_exit(model: ZooForCausalLM, layers: int) -> ZooForCausalLM:
    """A model of the first layers of `model`, its norm and its head; no weight is copied."""
    if not isinstance(model, ZooForCausalLM):
        raise TypeError(f"early_layers needs a ZooForCausalLM, got a {type(model).__name__}: use a draft or a lookup")
    count = len(model.model.layers)
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise TypeError(f"early_layers must be a number of layers, got {layers!r}")
    if not 0 < layers < count:
        raise ValueError(f"early_layers must be from 1 to {count - 1} of the model's {count} layers, got {layers}")
    shorter, inner = copy.copy(model), copy.copy(model.model)
    inner._modules = {**model.model._modules, "layers": model.model.layers[:layers]}
    shorter._modules = {**model._modules, "model": inner}
    shorter.config = copy.deepcopy(model.config)
    shorter.config.num_hidden_layers = layers
    return shorter
