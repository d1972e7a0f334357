"""Models that read a batch of texts, each from where an earlier text stopped.

memory, features = reader.read(memory, rows, wanted, keep=True)     # rows: the next tokens of each text
memory.select(index)                                                # forks of what was read
logits = reader.head(features)                                      # at the wanted positions only
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import PREFILL_CHUNK, CausalLM

Wanted = tuple[Tensor, Tensor]  # rows and positions in them, [n] each


class ZooReader:
    """A model of lm_zoo: texts of any lengths side by side, memory of constant size per text."""

    ragged = True  # texts of different lengths can be gone on from
    shares = True

    def __init__(self, model: CausalLM):
        self.model = model

    def read(
        self, memory: ZooCache | None, rows: list[list[int]], wanted: Wanted, *, keep: bool, prefix: bool = False
    ) -> tuple[ZooCache | None, Tensor]:
        """What was read, if it is to be kept, and the hidden states `[n, D]` at the wanted positions.

        With `prefix` the tokens of a row see all of each other, in the layers that can do that.
        """
        ids, mask = _padded(rows, self.model.device)
        length = ids.shape[1] if prefix else PREFILL_CHUNK
        options = {"prefix_length": mask.sum(dim=1)} if prefix else {}
        if memory is None and (keep or ids.shape[1] > length):
            memory = self.model.init_cache(len(rows))
        features, (row, position) = None, wanted
        for start in range(0, ids.shape[1], length):
            piece = slice(start, start + length)
            hidden = self.model.hidden_states(ids[:, piece], mask[:, piece], past_key_values=memory, **options)
            if features is None:
                features = hidden.new_empty(len(row), hidden.shape[-1])
            here = (position >= start) & (position < start + hidden.shape[1])
            features[here] = hidden[row[here], position[here] - start]
        return memory, features

    def head(self, features: Tensor) -> Tensor:
        return self.model.head(features)


class TransformerMemory:
    """Keys and values of transformers' own cache, with the forking of a `ZooCache`."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache

    def select(self, index: Tensor) -> TransformerMemory:
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(index)
        return TransformerMemory(cache)


class TransformerReader:
    """Any other causal LM of transformers, whose memory is keys and values; one with another memory shares nothing.

    What is to be gone on from has rows of one length, so nothing is ever padded on the left.
    """

    ragged = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        layers = DynamicCache(config=model.config).layers
        takes = inspect.signature(model.forward).parameters
        can_fork = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        self.shares = can_fork and "past_key_values" in takes
        self._keeps_some = "logits_to_keep" in takes

    def read(
        self, memory: TransformerMemory | None, rows: list[list[int]], wanted: Wanted, *, keep: bool
    ) -> tuple[TransformerMemory | None, Tensor]:
        """The same, with the logits themselves in the place of hidden states."""
        ids, _ = _padded(rows, self.model.device)
        row, position = wanted
        options = {}
        if self._keeps_some:
            kept, position = torch.unique(position, return_inverse=True)
            options["logits_to_keep"] = kept
        cache = None if memory is None else memory.cache
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=keep or cache is not None, **options)
        memory = TransformerMemory(output.past_key_values) if keep else None
        return memory, output.logits[row, position]

    def head(self, features: Tensor) -> Tensor:
        return features


def reader_of(model: PreTrainedModel) -> ZooReader | TransformerReader:
    return ZooReader(model) if isinstance(model, CausalLM) else TransformerReader(model)


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]`, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids.to(device), mask.to(device)
