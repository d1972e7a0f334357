"""What a model remembers of the texts that it has read: one state per layer, as a `transformers` cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lm_zoo.cache_files import load_cache, model_hash, save_cache
from lm_zoo.layers import LayerState

if TYPE_CHECKING:
    from lm_zoo.causal_lm import CausalLM
    from lm_zoo.decode import DecodeStep


class ZooCache(Cache):
    """The states of all layers, one row per text, as `model.init_cache(batch_size)` makes it.

        cache = model.init_cache(batch_size)
        model(prompt, past_key_values=cache)               # any number of calls of any length
        model.generate(ids, past_key_values=cache)         # continues from what the cache holds
        answers = cache.fork(4)                            # four copies of each row, to continue in four ways
        cache.save(path); ZooCache.load(path, model)       # goes on another day

    `length` counts the columns that went in, padding included: `generate()` cuts its input there.

    Tokens can be taken back if that was announced before they came:

        cache.record()                                     # from here on
        model(guesses, past_key_values=cache)              # any number of calls
        cache.keep([3, 0])                                 # of row 0 three tokens stay, of row 1 none; announced anew
        cache.settle()                                     # from here on no more
    """

    def __init__(self, states: list[LayerState], length: int = 0, model: CausalLM | None = None):
        super().__init__(layers=[])  # the states stand in for the layers of transformers
        self.states = states
        self.length = length
        self.step: DecodeStep | None = None  # of the `generate()` that is going on
        self._model = None if model is None else weakref.ref(model)  # whose states they are
        self._start: int | None = None  # the length at which the record begins

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "step": None}  # no weak reference can be pickled

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"ZooCache({len(self.states)} layers, batch size {self.batch_size}, length {self.length})"

    @property
    def batch_size(self) -> int:
        return self.states[0].batch_size

    @property
    def model(self) -> CausalLM | None:
        """The model of whose `init_cache` it comes, while that exists; a pickled cache forgets it."""
        return None if self._model is None else self._model()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, for all layers and rows together."""
        return sum(state.nbytes for state in self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def recording(self) -> bool:
        """Whether the tokens that come can be taken back."""
        return self._start is not None

    def record(self) -> None:
        """From here on tokens can be taken back. It costs a copy of the states, and the keys, values and gates."""
        for state in self.states:
            state.begin()
        self._start = self.length

    def keep(self, counts: list[int], write: Callable[[list[int], int], None] | None = None) -> None:
        """Take back what was read since `record()`, or the last `keep`, but for the first `counts[n]` tokens of row n.

        The states are written again from where they were, by the keys, values and gates of the tokens that stay. Where
        the counts differ the rows are of different lengths from here on, and `length` is the longest one's.

        write: what writes the states, in place of `state.keep(counts, read)` of each.
        """
        read = self.read_since_record
        if len(counts) != self.batch_size or not all(0 <= count <= read for count in counts):
            raise ValueError(
                f"counts must be {self.batch_size} numbers from 0 to {read}, the tokens read since record(), "
                f"got {counts}"
            )
        if write is not None:
            write(counts, read)
        else:
            for state in self.states:
                state.keep(counts, read)
        self.length += max(counts) - read
        self.record()

    def settle(self) -> None:
        """What was read stays, and what comes cannot be taken back."""
        for state in self.states:
            state.journal = None
        self._start = None

    @property
    def read_since_record(self) -> int:
        if self._start is None:
            raise ValueError("the cache cannot go back to an earlier token: call record() before those to be undone")
        return self.length - self._start

    activate_past_recording = record  # as transformers calls it

    @property
    def is_croppable(self) -> bool:
        return self.recording

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for state in self.states:
            state.reorder_(beam_idx)
        self._rows_changed()

    def select(self, index: Tensor) -> ZooCache:
        """A new cache whose row n is a copy of row `index[n]`; any number of rows."""
        return ZooCache([state.select(index) for state in self.states], self.length, self.model)

    def fork(self, copies: int) -> ZooCache:
        """A new cache with `copies` copies of each row, side by side."""
        rows = torch.arange(self.batch_size, device=next(iter(self.states[0].tensors.values())).device)
        return self.select(rows.repeat_interleave(copies))

    def clone(self) -> ZooCache:
        return ZooCache([state.clone() for state in self.states], self.length, self.model)

    def trim(self) -> ZooCache:
        """The same without room to grow; the tensors are shared."""
        return ZooCache([state.trim() for state in self.states], self.length, self.model)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that only the same model loads, see `lm_zoo.cache_files`."""
        if self.model is None:
            raise ValueError("the cache no longer knows its model: save() one of init_cache, select, fork or clone")
        save_cache(path, self, model_hash(self.model))

    @classmethod
    def load(cls, path: str | Path, model: CausalLM) -> ZooCache:
        """The cache in a file, for the model that wrote it; a file of another model or a damaged one is refused."""
        return load_cache(path, model)[0]

    def detach_(self) -> ZooCache:
        for state in self.states:
            state.detach_()
        return self

    def reset(self) -> None:
        for state in self.states:
            state.reset()
        self.length = 0
        self._rows_changed()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [state.select(indices) for state in self.states]
        self._rows_changed()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = self.fork(repeats).states
        self._rows_changed()

    def _rows_changed(self) -> None:
        if self.recording:  # what was noted is of other rows: it can no longer be taken back
            self.record()

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' form of `keep`: take back `-tokens_to_remove` tokens of each row."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if tokens_to_remove == 0 and not self.recording:
            return
        kept = self.read_since_record + tokens_to_remove
        if kept < 0:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back, only the {self.read_since_record} since record() or "
                "the last crop"
            )
        self.keep([kept] * self.batch_size)

    def update(self, *args, **kwargs):
        raise TypeError("a ZooCache holds the states of lm_zoo's layers and takes no keys and values of other models")
