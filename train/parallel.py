"""How the processes of a run share its work: the tokens of a sequence, the matrices of a block, and the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.kernels.sequence_parallel import SequenceGroup, sequence_parallel
from lm_zoo.kernels.sequence_parallel.group import FORMS
from lm_zoo.model import ZooForCausalLM
from lm_zoo.train.sharded_init import sharded_model
from lm_zoo.train.shards import load_shards, save_shards
from lm_zoo.train.tensor_parallel import cut_model


@dataclass(frozen=True)
class Parallel:
    """Processes as a grid of data x sequence x tensor: those that differ in the last two share every batch.

    Neighbours share matrices, their groups a sequence, so that either stays on one machine while its processes do.

    Args:
        sequence: Processes, or groups of them, that share a sequence, each with as many of its tokens.
        form: How they do: all_gather for few of them, ring for many, see `sequence_parallel`.
        tensor: Processes that share matrices: each has a part of the heads, of the MLPs and of the vocabulary, and
            computes with it for the same tokens.
        shard: replicate: every process holds all parameters and their optimizer state. full: each holds its part, and
            fetches a block's parameters while it computes the block (FSDP2). hybrid: full within a machine, replicate
            among machines. With tensor this is said of the processes that have the same parts.
    """

    sequence: int = 1
    form: Literal["all_gather", "ring"] = "all_gather"
    tensor: int = 1
    shard: Literal["replicate", "full", "hybrid"] = "replicate"

    def __post_init__(self) -> None:
        for name in ("sequence", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}={getattr(self, name)} is not possible; give at least 1")
        if self.form not in FORMS:
            raise UserError(f"parallel.form={self.form} is not known; choose {' or '.join(FORMS)}")
        if self.shard not in ("replicate", "full", "hybrid"):
            raise UserError(f"parallel.shard={self.shard} is not known; choose replicate, full or hybrid")

    def strategy(self, given: str | Strategy) -> str | Strategy:
        """Of the Trainer: the one given (by default Lightning's choice) where processes share nothing but batches."""
        if self == Parallel(form=self.form):
            return given
        if given != "auto":
            raise UserError(f"trainer.strategy={given} and parallel both say what processes share; leave the first out")
        return MeshStrategy(self)

    def check(self, processes: int, machines: int, seq_len: int) -> None:
        if processes // machines % self.tensor:
            raise UserError(
                f"parallel.tensor={self.tensor} does not divide the {processes // machines} processes of a machine; "
                "give a divisor, or another trainer.devices"
            )
        if processes // self.tensor % self.sequence:
            over = "" if self.tensor == 1 else f" over parallel.tensor={self.tensor}"
            raise UserError(
                f"parallel.sequence={self.sequence} does not divide the {processes} processes of the run{over}; give a "
                "divisor, or another trainer.devices or trainer.num_nodes"
            )
        if seq_len % self.sequence or seq_len < 2 * self.sequence:
            longer = max(2, -(-seq_len // self.sequence)) * self.sequence
            raise UserError(
                f"data.seq_len={seq_len} does not give parallel.sequence={self.sequence} processes two tokens or more "
                f"each, as many to all; {longer} would"
            )


class MeshStrategy(ModelParallelStrategy):
    """FSDP2 over all processes that have the same parts of matrices, and groups of processes that share a sequence or
    matrices. Checkpoints are `WholeFolderIO`'s, in shards."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__(tensor_parallel_size=parallel.tensor)
        self.parallel = parallel

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._setup_distributed()
        shared = (self.parallel.sequence, self.parallel.tensor)
        sizes = (self.world_size // math.prod(shared), *shared)
        names = ("data_parallel", "sequence", "tensor_parallel")  # the outer ones as Lightning calls them
        self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    def shard_mesh(self) -> DeviceMesh:
        """Parameters are the same along `replicate`, lie in shards along `shard`, and are cut along `tensor`."""
        alike = self.world_size // self.parallel.tensor
        replicas = {"replicate": alike, "full": 1, "hybrid": self.num_nodes}[self.parallel.shard]
        sizes, names = (replicas, alike // replicas, self.parallel.tensor), ("replicate", "shard", "tensor")
        return init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    def new_model(self, config: ZooConfig, prepare: Callable[[ZooForCausalLM], None]) -> ZooForCausalLM:
        """Sharded block by block, and the rest (embeddings, last norm) as one; gradients are the processes' mean.

        `prepare` is called before, with the model as it will be sharded.
        """
        whole = self.shard_mesh()
        mesh = whole["shard"] if self.parallel.shard == "full" else whole["replicate", "shard"]

        def shard(model: ZooForCausalLM) -> None:
            prepare(model)
            if self.parallel.tensor > 1:
                cut_model(model, whole["tensor"])
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

        return sharded_model(config, shard, self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save_shards(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        likes = {f"state_dict/{name}": value for name, value in self.lightning_module_state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            likes |= {f"optimizer_states/{i}/state/{j}": parameter for j, parameter in enumerate(parameters)}
        return load_shards(Path(self.broadcast(checkpoint_path)), likes)


def data_process(trainer: L.Trainer) -> tuple[int, int]:
    """Which part of the data this process reads, and of how many: who shares sequences or matrices reads the same."""
    parallel = _parallel(trainer)
    sharing = parallel.sequence * parallel.tensor
    return trainer.global_rank // sharing, trainer.world_size // sharing


def sequence_processes(trainer: L.Trainer) -> int:
    """How many processes share a sequence."""
    return _parallel(trainer).sequence


def tensor_processes(trainer: L.Trainer) -> int:
    """How many processes share matrices."""
    return _parallel(trainer).tensor


def of_all_parts(trainer: L.Trainer, x: Tensor) -> Tensor:
    """What each of the processes that share matrices has, one after another in the first dimension."""
    return DTensor.from_local(x, trainer.strategy.device_mesh["tensor_parallel"], [Shard(0)]).full_tensor()


@contextmanager
def shared_sequence(trainer: L.Trainer) -> Iterator[SequenceGroup | None]:
    """In the block, the model takes this process's part of the tokens, if the run's processes share sequences."""
    parallel = _parallel(trainer)
    if parallel.sequence == 1:
        yield None
        return
    with sequence_parallel(trainer.strategy.device_mesh["sequence"], form=parallel.form) as group:
        yield group


def full_weights(trainer: L.Trainer, model: ZooForCausalLM) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, gathered in process 0 (empty in the others); `None` for one that is whole."""
    if not isinstance(trainer.strategy, MeshStrategy):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in weights.items() if name not in model.all_tied_weights_keys}


def _parallel(trainer: L.Trainer) -> Parallel:
    return trainer.strategy.parallel if isinstance(trainer.strategy, MeshStrategy) else Parallel()
