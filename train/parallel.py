"""How the processes of a run share its work: the tokens of a sequence, and the parameters."""

from __future__ import annotations

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

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.kernels.sequence_parallel import SequenceGroup, sequence_parallel
from lm_zoo.kernels.sequence_parallel.group import FORMS
from lm_zoo.model import ZooForCausalLM
from lm_zoo.train.sharded_init import sharded_model
from lm_zoo.train.shards import load_shards, save_shards


@dataclass(frozen=True)
class Parallel:
    """Processes as a grid of data x sequence: those of a row share every batch, and each has a part of its tokens.

    Neighbours are in one row, so a sequence stays on one machine while its processes do.

    Args:
        sequence: Processes that share a sequence, each with as many of its tokens.
        form: How they do: all_gather for few of them, ring for many, see `sequence_parallel`.
        shard: replicate: every process holds all parameters and their optimizer state. full: each holds its part, and
            fetches a block's parameters while it computes the block (FSDP2). hybrid: full within a machine, replicate
            among machines.
    """

    sequence: int = 1
    form: Literal["all_gather", "ring"] = "all_gather"
    shard: Literal["replicate", "full", "hybrid"] = "replicate"

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise UserError(f"parallel.sequence={self.sequence} is not possible; give at least 1")
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

    def check(self, processes: int, seq_len: int) -> None:
        if processes % self.sequence:
            raise UserError(
                f"parallel.sequence={self.sequence} does not divide the {processes} processes of the run; give a "
                "divisor, or another trainer.devices or trainer.num_nodes"
            )
        if seq_len % self.sequence or seq_len < 2 * self.sequence:
            longer = max(2, -(-seq_len // self.sequence)) * self.sequence
            raise UserError(
                f"data.seq_len={seq_len} does not give parallel.sequence={self.sequence} processes two tokens or more "
                f"each, as many to all; {longer} would"
            )


class MeshStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, and groups of them for the sequences. Checkpoints are `WholeFolderIO`'s, in shards."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._setup_distributed()
        rows = (self.world_size // self.parallel.sequence, self.parallel.sequence)
        names = ("data_parallel", "sequence")  # the first as Lightning calls it
        self._device_mesh = init_device_mesh(self.root_device.type, rows, mesh_dim_names=names)

    def shard_mesh(self) -> DeviceMesh:
        """Whose last dimension shares the parameters; they are the same along the one before."""
        replicas = {"replicate": self.world_size, "full": 1, "hybrid": self.num_nodes}[self.parallel.shard]
        sizes, names = (replicas, self.world_size // replicas), ("replicate", "shard")
        if self.parallel.shard == "full":
            sizes, names = sizes[1:], names[1:]
        return init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    def new_model(self, config: ZooConfig, prepare: Callable[[ZooForCausalLM], None]) -> ZooForCausalLM:
        """Sharded block by block, and the rest (embeddings, last norm) as one; gradients are the processes' mean.

        `prepare` is called before, with the model as it will be sharded.
        """
        mesh = self.shard_mesh()

        def shard(model: ZooForCausalLM) -> None:
            prepare(model)
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
    """Which part of the data this process reads, and of how many: processes that share sequences read the same."""
    sequence = _parallel(trainer).sequence
    return trainer.global_rank // sequence, trainer.world_size // sequence


def sequence_processes(trainer: L.Trainer) -> int:
    """How many processes share a sequence."""
    return _parallel(trainer).sequence


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
