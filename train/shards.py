"""A checkpoint of sharded tensors: the folder of `snapshot.py`, but every process has written what it holds.

    shards/                of torch.distributed.checkpoint: a file per process, and `.metadata`: what lies where
    state.json             as in any checkpoint
    manifest.json          written last, by the first process

A tensor has the name that it has in an unsharded checkpoint, so either kind is read on any number of processes.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lm_zoo.errors import UserError, one_line
from lm_zoo.files import whole_folder
from lm_zoo.train.snapshot import TENSORS, flatten, load_tree, write_tree

SHARDS = "shards"


def save_shards(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint under a temporary name and renames it. Every process calls it with its part of `state`."""
    tree, tensors = flatten(state)
    first = dist.get_rank() == 0
    try:
        with whole_folder(path) if first else nullcontext() as unfinished:
            folder = [unfinished]
            dist.broadcast_object_list(folder)
            dcp.save(tensors, checkpoint_id=folder[0] / SHARDS)
            if first:
                write_tree(tree, folder[0], {})
    except (OSError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"cannot save {path}: {failure_of(error)}; earlier checkpoints are whole: free some space, then continue "
            "with --resume last"
        ) from error
    dist.barrier()


def failure_of(error: BaseException) -> str:
    """What went wrong, in the words of the first process that it went wrong in: the error itself has all tracebacks."""
    if isinstance(error, dcp.api.CheckpointException):
        error = min(error.failures.items())[1][0]
    return getattr(error, "strerror", None) or one_line(error)


def load_shards(path: Path, likes: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint of either kind, with each tensor sharded as the one of its shape in `likes`.

    `likes` has tensors by the names of the checkpoint's, or by what such names have before their last `/`.
    """
    empty = _empty_tensors(path) if (path / SHARDS).is_dir() else load_file(path / TENSORS)
    tensors = {name: _sharded_as(likes.get(name, likes.get(name.rpartition("/")[0])), x) for name, x in empty.items()}
    if (path / SHARDS).is_dir():
        dcp.load(tensors, checkpoint_id=path / SHARDS)
    return load_tree(path, tensors)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of either kind, whole and on the CPU."""
    if not (path / SHARDS).is_dir():
        return load_file(path / TENSORS)
    tensors = {name: torch.empty_like(x, device="cpu") for name, x in _empty_tensors(path).items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a single process loads
        dcp.load(tensors, checkpoint_id=path / SHARDS, no_dist=True)
    return tensors


def _empty_tensors(path: Path) -> dict[str, Tensor]:
    entries = dcp.FileSystemReader(path / SHARDS).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in entries.items()
    }


def _sharded_as(like: Tensor | None, x: Tensor) -> Tensor:
    if isinstance(like, DTensor) and like.shape == x.shape:
        if x.is_meta:
            return torch.empty_like(like, dtype=x.dtype)
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(x, device="cpu") if x.is_meta else x
