"""A streamed student as a folder that `AutoModelForCausalLM` loads: one safetensors file per layer, and their index."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lm_zoo.linearized.config import CODE_FILE
from lm_zoo.linearized.model import CODE
from lm_zoo.train.linearize.stream_weights import INDEX, NAMES

Source = tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]  # shape, dtype, and how to get the tensor


def save_shards(shards: list[dict[str, Source]], folder: Path) -> None:
    """Writes each of the mappings name -> tensor as a file, a tensor in memory at a time."""
    shards = [shard for shard in shards if shard]
    places, total_bytes, total = {}, 0, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
        total += sum(math.prod(shape) for shape, _, _ in shard.values())
        total_bytes += sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in shard.values())
    metadata = {"total_parameters": total, "total_size": total_bytes}
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / INDEX).write_text(index + "\n", encoding="utf-8")


def save_without_weights(student, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    config = copy.deepcopy(student.config)
    config.architectures = ["LinearizedForCausalLM"]
    config.dtype = student.dtype
    config.save_pretrained(folder)
    student.generation_config.save_pretrained(folder)
    (folder / f"{CODE_FILE}.py").write_text(CODE, encoding="utf-8")


def _save_file(tensors: dict[str, Source], path: Path) -> None:
    """A safetensors file, as `stream_weights` describes it."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype, _) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, read in tensors.values():
            file.write(memoryview(read().detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
