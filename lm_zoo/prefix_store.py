"""Prefixes that many texts share are read once: states at chunk borders, found by the hash of the tokens before."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from lm_zoo.cache import ZooCache
from lm_zoo.cache_files import load_cache, model_hash, save_cache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.errors import UserError

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class PrefixStore:
    """What a model remembers of prefixes that it has read.

        store = PrefixStore(model, budget="1GiB")
        cache = store.prefill(input_ids)                              # reads what no earlier text had in common
        model.generate(input_ids, past_key_values=cache)              # goes on from there

    The first text that begins with a prefix pays for it, later ones, in the same batch or in other calls, read what
    comes after the last chunk border that they share. The result is that of no store, up to the rounding of another
    split into calls. States of softmax attention grow with the text, so a store holds fewer of them.

    Args:
        model: its weights must not change as long as the store is used.
        budget: bytes of states held in memory, a number or a string such as "500MB" or "1GiB". The state that was not
            used for the longest time goes first; one larger than the budget is not kept.
        chunk: tokens from one border to the next. Of a shared prefix up to `chunk` - 1 tokens are read again; a state
            is kept per chunk.
        folder: where to keep every state as a file too, for later processes and beyond the budget; nothing is ever
            deleted there. Files of another model are left alone and not read.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        budget: int | str = "1GiB",
        chunk: int = 256,
        folder: str | Path | None = None,
    ):
        if not isinstance(model, CausalLM):
            raise TypeError(f"model must be one of lm_zoo, got {type(model).__name__}")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
        self.model = model
        self.budget = _bytes(budget)
        self.chunk = chunk
        self.folder = None if folder is None else Path(folder)
        self.tokens_read = 0  # by the model
        self.tokens_found = 0  # whose states were here already
        self.nbytes = 0  # of the states in memory
        self._states: OrderedDict[bytes, ZooCache] = OrderedDict()  # the one not used for the longest time first
        self._model_id = "" if folder is None else model_hash(model)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return f"PrefixStore({len(self)} states, {self.nbytes:,} of {self.budget:,} bytes, chunk {self.chunk})"

    def clear(self) -> None:
        """Forget the states in memory; the folder stays."""
        self._states.clear()
        self.nbytes = 0

    @torch.inference_mode(False)  # what is kept may be continued outside of inference mode
    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> ZooCache:
        """A cache that has read all tokens of a batch but each row's last, as `generate` and a next call need it.

        Args:
            input_ids: `[B, T]`, rows of one length, without padding.
        """
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be [B, T] with at least one token, got {list(input_ids.shape)}")
        border = (input_ids.shape[1] - 1) // self.chunk * self.chunk
        prefixes = [self._prefix(row[None, :border]) for row in input_ids] if border else []
        if not prefixes:
            cache = self.model.init_cache(input_ids.shape[0])
        elif len(prefixes) == 1:
            cache = prefixes[0].clone()
        else:
            cache = joined(prefixes)
        self._read(cache, input_ids[:, border:-1])
        return cache

    def _prefix(self, ids: Tensor) -> ZooCache:
        """The cache of one text `[1, n chunk]`, which the store may hold: not to be written into."""
        keys = self.keys(ids)
        cache, start = None, len(keys)
        while cache is None and start > 0:
            start -= 1
            cache = self.find(keys[start])
        done = 0 if cache is None else (start + 1) * self.chunk
        self.tokens_found += done
        if done == ids.shape[1]:
            return cache
        cache = self.model.init_cache(1) if cache is None else cache.clone()
        for key, piece in zip(keys[done // self.chunk :], ids[:, done:].split(self.chunk, dim=1), strict=True):
            self._read(cache, piece)
            self.keep(key, cache)
        return cache

    def _read(self, cache: ZooCache, ids: Tensor) -> None:
        if ids.shape[1]:
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            self.tokens_read += ids.numel()

    def keys(self, ids: Tensor) -> list[bytes]:
        """For each border of a text `[1, n chunk]` the hash of all tokens before it, by which states are found."""
        found, keys = hashlib.sha256(str(self._place()).encode()), []
        for piece in ids[0].to(device="cpu", dtype=torch.int64).split(self.chunk):
            found.update(piece.numpy())
            keys.append(found.digest())
        return keys

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where states are and what they are computed in: those of a model that was moved are others."""
        return self.model.device, self.model._cache_dtype

    @torch.inference_mode(False)  # as in `prefill`
    @torch.no_grad()
    def find(self, key: bytes) -> ZooCache | None:
        """The cache at a border: not to be written into."""
        cache = self._states.get(key)
        if cache is not None:
            self._states.move_to_end(key)
            return cache
        path = self._path(key)
        if path is None or not path.exists():
            return None
        cache, _ = load_cache(path, self.model, self._model_id)
        self._hold(key, cache)
        return cache

    @torch.inference_mode(False)
    @torch.no_grad()
    def keep(self, key: bytes, cache: ZooCache) -> None:
        """Hold a copy of the cache at a border."""
        cache = cache.trim().clone()
        path = self._path(key)
        if path is not None and not path.exists():
            save_cache(path, cache, self._model_id)
        self._hold(key, cache)

    def _hold(self, key: bytes, cache: ZooCache) -> None:
        if cache.nbytes > self.budget:
            return
        self._states[key] = cache
        self.nbytes += cache.nbytes
        while self.nbytes > self.budget:
            self.nbytes -= self._states.popitem(last=False)[1].nbytes

    def _path(self, key: bytes) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / self._model_id[:16] / f"{key.hex()}.safetensors"


def joined(caches: list[ZooCache]) -> ZooCache:
    """One cache of the rows of all, which have the same length."""
    joined = caches[0].fork(len(caches))
    for row, cache in enumerate(caches[1:], 1):
        if cache is not caches[0]:
            for state, other in zip(joined.states, cache.states, strict=True):
                state.put(row, other)
    return joined


def _bytes(budget: int | str) -> int:
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        if match is None or match[2] not in UNITS:
            raise UserError(f"budget must be a number of bytes or a string such as '500MB' or '1GiB', got {budget!r}")
        return int(float(match[1]) * UNITS[match[2]])
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"budget must be a number of bytes or a string such as '1GiB', got {budget!r}")
    return budget
