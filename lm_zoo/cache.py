"""What a model remembers of the texts that it has read: one state per layer, as a `transformers` cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lm_zoo.layers import LayerState


class ZooCache(Cache):
    """The states of all layers, one row per text, as `model.init_cache(batch_size)` makes it.

        cache = model.init_cache(batch_size)
        model(prompt, past_key_values=cache)               # any number of calls of any length
        model.generate(ids, past_key_values=cache)         # continues from what the cache holds
        answers = cache.fork(4)                            # four copies of each row, to continue in four ways

    `length` counts the columns that went in, padding included: `generate()` cuts its input there. The states cannot go
    back to an earlier token, so `crop` is refused.
    """

    def __init__(self, states: list[LayerState], length: int = 0):
        super().__init__(layers=[])  # the states stand in for the layers of transformers
        self.states = states
        self.length = length

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"ZooCache({len(self.states)} layers, batch size {self.batch_size}, length {self.length})"

    @property
    def batch_size(self) -> int:
        return self.states[0].batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, for all layers and rows together."""
        return sum(state.nbytes for state in self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_croppable(self) -> bool:
        return False

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for state in self.states:
            state.reorder_(beam_idx)

    def select(self, index: Tensor) -> ZooCache:
        """A new cache whose row n is a copy of row `index[n]`; any number of rows."""
        return ZooCache([state.select(index) for state in self.states], self.length)

    def fork(self, copies: int) -> ZooCache:
        """A new cache with `copies` copies of each row, side by side."""
        rows = torch.arange(self.batch_size, device=next(iter(self.states[0].tensors.values())).device)
        return self.select(rows.repeat_interleave(copies))

    def clone(self) -> ZooCache:
        return ZooCache([state.clone() for state in self.states], self.length)

    def detach_(self) -> ZooCache:
        for state in self.states:
            state.detach_()
        return self

    def reset(self) -> None:
        for state in self.states:
            state.reset()
        self.length = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [state.select(indices) for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = self.fork(repeats).states

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a ZooCache cannot go back to an earlier token: clone() it before the tokens to be undone")

    def update(self, *args, **kwargs):
        raise TypeError("a ZooCache holds the states of lm_zoo's layers and takes no keys and values of other models")
