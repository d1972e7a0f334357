"""Prompts, read a piece at a time and in turns: a long one holds up neither short ones nor the texts being written."""

from __future__ import annotations

from collections import deque
from itertools import accumulate

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.prefix_store import PrefixStore, joined
from lm_zoo.serving.request import Request


class Prompt:
    """A prompt of which the model has read the first `done` tokens."""

    def __init__(self, request: Request, store: PrefixStore | None):
        self.request = request
        self.ids = torch.tensor([request.ids])
        self.done = 0
        self.cache: ZooCache | None = None
        # The last token is in no stored prefix: its logits are wanted.
        border = 0 if store is None else (len(request.ids) - 1) // store.chunk * store.chunk
        self.keys = store.keys(self.ids[:, :border]) if border else []

    @property
    def left(self) -> int:
        return self.ids.shape[1] - self.done


class Reader:
    """The prompts that are being read.

    A turn reads `chunk` tokens at most: of the prompt whose turn it is, and where that needs less, of the next ones
    with it, packed. With a store, what others have read before is taken from there, and each state at a border of its
    chunks is kept in it.
    """

    def __init__(self, model: CausalLM, chunk: int, store: PrefixStore | None = None):
        self.model = model
        self.chunk = chunk
        self.store = store
        self.prompts: deque[Prompt] = deque()

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, request: Request) -> None:
        self.prompts.append(Prompt(request, self.store))

    def drop(self, requests: set[Request]) -> None:
        self.prompts = deque(prompt for prompt in self.prompts if prompt.request not in requests)

    def take_turn(self) -> list[tuple[Prompt, int]]:
        """The prompts whose turn it is and how many tokens to `read` of each; those with more go to the back."""
        turn, left = [], self.chunk
        for _ in range(len(self.prompts)):
            prompt = self.prompts.popleft()
            self._look_up(prompt)
            size = min(prompt.left, left)
            if self.store is not None:
                size = min(size, self.store.chunk - prompt.done % self.store.chunk)
            turn.append((prompt, size))
            left -= size
            if left == 0:
                break
        self.prompts.extend(prompt for prompt, size in turn if size < prompt.left)
        return turn

    def read(self, turn: list[tuple[Prompt, int]]) -> tuple[list[Prompt], Tensor]:
        """Read a turn. Returns the prompts that were read to their end, and the logits after them `[n, V]`."""
        prompts = [prompt for prompt, _ in turn]
        for prompt in prompts:
            if prompt.cache is None:
                prompt.cache = self.model.init_cache(1)
        pieces = [prompt.ids[:, prompt.done : prompt.done + size] for prompt, size in turn]
        ids = torch.cat(pieces, dim=1).to(self.model.device)
        if len(prompts) == 1:
            hidden = self.model.hidden_states(ids, past_key_values=prompts[0].cache)
        else:
            hidden = self._read_packed(prompts, ids, [piece.shape[1] for piece in pieces])
        ends = []
        for (prompt, size), end in zip(turn, accumulate(size for _, size in turn), strict=True):
            prompt.done += size
            if self.store is not None:
                self.store.tokens_read += size
            prompt.cache.length = prompt.done
            if prompt.left and prompt.keys and prompt.done % self.store.chunk == 0:
                self.store.keep(prompt.keys[prompt.done // self.store.chunk - 1], prompt.cache)
            if prompt.left == 0:
                ends.append(end - 1)
        return [prompt for prompt in prompts if prompt.left == 0], self.model.head(hidden[0, ends])

    def _read_packed(self, prompts: list[Prompt], ids: Tensor, sizes: list[int]) -> Tensor:
        cache = joined([prompt.cache for prompt in prompts])
        cache.length = max(prompt.done for prompt in prompts)
        borders = torch.tensor([0, *accumulate(sizes)], device=ids.device)
        hidden = self.model.hidden_states(ids, past_key_values=cache, cu_seqlens=borders)
        for row, prompt in enumerate(prompts):
            prompt.cache = cache.select(borders.new_tensor([row]))
        return hidden

    def _look_up(self, prompt: Prompt) -> None:
        """Go on from the last border that the store knows by now, where that is further on."""
        if self.store is None or prompt.done % self.store.chunk:
            return
        for border in reversed(range(prompt.done // self.store.chunk, len(prompt.keys))):
            found = self.store.find(prompt.keys[border])
            if found is not None:
                self.store.tokens_found += found.length - prompt.done
                prompt.cache, prompt.done = found.clone(), found.length
                return
