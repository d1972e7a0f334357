"""The states of all texts that are being written: row n of every tensor is text n's."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.decode import DecodeStep, recordable

RECORDED = 8  # rows up to which a step is recorded: one of more rows takes longer than its Python


class Slots:
    """Texts enter and leave between any two steps; a step computes as many rows as there are texts.

        slots.enter([cache])             # a text that has been read: the last row
        logits = slots.step([token])     # [n, V], after one token of each
        slots.leave([0])                 # the last row takes its place

    The tensors have room for more rows, of which a step sees the first n. So to enter or to leave moves one row, and
    the memory is at most twice that of the most texts there have been at a time. What grew with the length of the texts
    is given back when there is none.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.lengths: list[int] = []  # tokens that each text has seen
        self._kinds = model.init_cache(1).states
        self._buffers = [dict(state.tensors) for state in self._kinds]
        self._steps: dict[int, DecodeStep] = {}  # by the number of rows: each over the first rows of the buffers
        self._step: DecodeStep | None = None  # the one for the texts that there are
        self._recorded = False  # whether that one is, or will be, a recording
        self._grown = False  # whether states have put longer tensors in place of the buffers

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
        first = len(self.lengths)
        self.lengths += [cache.length for cache in caches]
        count = len(self.lengths)
        for tensors in self._buffers:
            for name, tensor in tensors.items():
                if tensor.shape[0] < count:
                    tensors[name] = _longer(tensor, max(count, 2 * first))
                    self._steps.clear()
                tensors[name][first:count].zero_()  # where a row is not written, a text before may have left NaN
        for layer, state in enumerate(self._arrange().states):
            for row, cache in enumerate(caches, first):
                state.put(row, cache.states[layer].trim())

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
        if self.lengths:
            self._arrange()
        elif self._grown:
            self.__init__(self.model)

    def step(self, tokens: list[int]) -> Tensor:
        """Every text takes in one token; logits of the next ones, `[n, V]`."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits = self._step(ids) if self._recorded else self.model(ids, past_key_values=self._step.cache).logits
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:, 0]

    def _arrange(self) -> ZooCache:
        """Let the next step be one of as many rows as there are texts."""
        count = len(self.lengths)
        if count not in self._steps:
            states = [
                kind.holding({name: tensor[:count] for name, tensor in tensors.items()})
                for kind, tensors in zip(self._kinds, self._buffers, strict=True)
            ]
            self._steps[count] = DecodeStep(self.model, ZooCache(states, 0, self.model))
        self._step = self._steps[count]
        for state in self._step.cache.states:
            state.recount()
        cache = self._step.cache
        cache.length = max(self.lengths)
        self._recorded = count <= RECORDED and recordable(self.model, cache)
        return cache

    def _take_back(self) -> None:
        """The tensors that states which grow have put in place of the buffers' rows."""
        if not self.lengths:
            return
        for state, tensors in zip(self._step.cache.states, self._buffers, strict=True):
            for name, tensor in state.tensors.items():
                if tensor.data_ptr() != tensors[name].data_ptr():
                    tensors[name] = tensor
                    self._steps = {self._step.cache.batch_size: self._step}
                    self._grown = True


def _longer(tensor: Tensor, rows: int) -> Tensor:
    """A tensor of so many rows that begins with it."""
    longer = tensor.new_zeros((rows, *tensor.shape[1:]))
    longer[: len(tensor)] = tensor
    return longer
