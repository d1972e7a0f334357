"""The states of all texts that are being written: row n of every tensor is text n's."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM


class Slots:
    """Texts enter and leave between any two steps; a step computes as many rows as there are texts.

        slots.enter([cache])             # a text that has been read: the last row
        logits = slots.step([token])     # [n, V], after one token of each
        slots.leave([0])                 # the last row takes its place

    The tensors have room for more rows, of which a step sees the first n. So to enter or to leave moves one row, and
    the memory is twice that of the most texts there have been at a time; it is given back when there is none.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.lengths: list[int] = []  # tokens that each text has seen
        self._kinds = model.init_cache(1).states
        self._buffers = [dict(state.tensors) for state in self._kinds]
        self._cache: ZooCache | None = None  # over the first rows of the buffers

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, for all layers, the room for more rows included."""
        self._take_back()
        return sum(tensor.nbytes for tensors in self._buffers for tensor in tensors.values())

    def enter(self, caches: list[ZooCache]) -> None:
        """Each cache, of one row, becomes a new last row."""
        self._take_back()
        first, count = len(self.lengths), len(self.lengths) + len(caches)
        states = []
        for layer, (kind, tensors) in enumerate(zip(self._kinds, self._buffers, strict=True)):
            for name in tensors:
                tensors[name] = _with_rows(tensors[name], count)
                tensors[name][first:count].zero_()  # where a row is not written, a text before may have left NaN
            state = kind.holding({name: tensor[:count] for name, tensor in tensors.items()})
            for row, cache in enumerate(caches, first):
                state.put(row, cache.states[layer].trim())
            states.append(state)
        self.lengths += [cache.length for cache in caches]
        self._cache = ZooCache(states, max(self.lengths), self.model)

    def leave(self, rows: list[int]) -> None:
        """Forget these rows; the last ones move to their places, from the highest down."""
        self._take_back()
        for row in sorted(rows, reverse=True):
            length = self.lengths.pop()
            if row < len(self.lengths):
                self.lengths[row] = length
                for tensors in self._buffers:
                    for tensor in tensors.values():
                        tensor[row].copy_(tensor[len(self.lengths)])
        if not self.lengths:
            self.__init__(self.model)
            return
        states = [
            kind.holding({name: tensor[: len(self.lengths)] for name, tensor in tensors.items()})
            for kind, tensors in zip(self._kinds, self._buffers, strict=True)
        ]
        self._cache = ZooCache(states, max(self.lengths), self.model)

    def step(self, tokens: list[int]) -> Tensor:
        """Every text takes in one token; logits of the next ones, `[n, V]`."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits = self.model(ids, past_key_values=self._cache).logits[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _take_back(self) -> None:
        """The tensors that states which grow have put in place of the buffers' rows."""
        if self._cache is None:
            return
        for state, tensors in zip(self._cache.states, self._buffers, strict=True):
            for name, tensor in state.tensors.items():
                if tensor.data_ptr() != tensors[name].data_ptr():
                    tensors[name] = tensor


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The tensor, or a longer one that begins with it."""
    have = tensor.shape[0]
    if have >= rows:
        return tensor
    longer = tensor.new_zeros((max(rows, 2 * have), *tensor.shape[1:]))
    longer[:have] = tensor
    return longer
