"""The weights of a saved model, read tensor by tensor: what nobody asks for stays on the disk.

A safetensors file is the length of its header in 8 bytes, the header in JSON (name -> dtype, shape, bytes from and to),
and the tensors' bytes. They are read into memory of our own and not mapped: mapped pages count as memory of the
process for as long as the file is open, and nothing bounds them.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm_zoo.errors import UserError, one_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
M_MMAP_THRESHOLD = -3  # of mallopt, in the C library's malloc.h
SMALLEST_MAPPED = 2**20  # bytes
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, and its first byte there."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder with `model.safetensors`, or with several files and their index, by name.

    Only headers are read here: UserError names a file that is missing or cut off, and a tensor that the index promises
    and its file does not have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        if (folder / INDEX).is_file():
            places = _weight_map(folder / INDEX)
        elif (folder / SINGLE).is_file():
            places = None
        else:
            raise UserError(f"{folder} has no {SINGLE}, and --mode stream reads no other format; save the model again")
        for file in [SINGLE] if places is None else sorted(set(places.values())):
            self.entries |= _read_header(folder / file)
        for name, file in (places or {}).items():
            if name not in self.entries or self.entries[name].file != folder / file:
                raise UserError(f"{folder / file} has no tensor {name}, which {INDEX} promises; save the model again")

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        entry = self.entries[name]
        with entry.file.open("rb") as file:
            return _read(file, entry, entry.start, entry.shape).to(device=device, dtype=dtype)

    def read_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some rows of a tensor, `[rows, ...]`."""
        entry = self.entries[name]
        shape = entry.shape[1:]
        size = math.prod(shape) * entry.dtype.itemsize
        with entry.file.open("rb") as file:
            read = [_read(file, entry, entry.start + row * size, shape) for row in rows]
        return torch.stack(read).to(device=device, dtype=dtype)


def return_freed_tensors() -> None:
    """Has malloc of the GNU C library take pages of their own for tensors, which go back when they are freed.

    It takes them from its heap otherwise, where the hidden states that a backward pass needs lie between what each
    layer has freed, so that no page goes back and the heap grows by a layer's activations with every layer.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED)


def read_bytes(file, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
    """A tensor of an open binary file from byte `start` on; `None` if the file ends before it does."""
    size = math.prod(shape) * dtype.itemsize
    # Pages of its own, which go back when the tensor is let go of: the heap would keep them, in pieces.
    tensor = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(dtype).view(tuple(shape))
    file.seek(start)
    count = file.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return tensor if count == tensor.nbytes else None


def _read(file, entry: Entry, start: int, shape: Sequence[int]) -> Tensor:
    tensor = read_bytes(file, start, entry.dtype, shape)
    if tensor is None:
        raise UserError(f"{entry.file} is cut off; fetch or save the model again")
    return tensor


def _weight_map(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise TypeError("weight_map must give a file for each tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); save the model again") from error
    return places


def _read_header(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        raise UserError(f"{path} is missing, and {INDEX} names it; fetch or save the model again")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        entries = {
            name: Entry(path, 8 + length + at["data_offsets"][0], DTYPES[at["dtype"]], tuple(at["shape"]))
            for name, at in header.items()
            if at["dtype"] in DTYPES  # others are masks and counters that transformers makes by itself
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged; fetch or save the model again") from error
    if any(entry.start + entry.nbytes > path.stat().st_size for entry in entries.values()):
        raise UserError(f"{path} is cut off; fetch or save the model again")
    return entries
