"""Checkpoints: whole or not at all, at the borders of optimizer steps only, and one when the run is interrupted.

Each is a folder with a manifest of checksums (see `snapshot.py`), so a damaged one is known before anything is read
from it. A checkpoint in the middle of an accumulation would lose the gradients gathered so far. Here a save that falls
due there waits for the step, so a resumed run is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm_zoo.errors import UserError
from lm_zoo.files import remove_folder, remove_unfinished, whole_folder
from lm_zoo.train.metrics import MetricsFile
from lm_zoo.train.shards import load_tensors
from lm_zoo.train.snapshot import check_seal, load_tree, save_snapshot

NAME = re.compile(r"step-(\d+)")
STDERR = 2  # its file descriptor


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run after a checkpoint was saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted, and saved {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step-NNN` in the run's folder, also before each validation, at the end and on Ctrl-C.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: How many to keep, the newest ones; 0 keeps all. With fewer than 2 there is none to go back to, should the
            newest turn out damaged.

    A run that is resumed from an earlier checkpoint replaces the later ones.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps={every_n_steps} is not possible; give at least 1")
        if keep < 0:
            raise UserError(f"checkpoint.keep={keep} is not possible; give 0 to keep all, or a number above")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step
        self._signum = None  # of an earlier run with the same object
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, self._on_signal)
        before = trainer._signal_connector
        if before.received_sigterm:  # while the run was being set up
            before.received_sigterm, self._signum = False, signal.SIGTERM
        self._repeat_lost_validation(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        validates = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        ends = trainer.should_stop or self._step == trainer.max_steps
        if stop or validates or ends or self._step % self.every_n_steps == 0:
            self.save(trainer)
        if stop:
            raise Interrupted(self._signum or signal.SIGTERM, self.path(trainer))

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """With a checkpoint from just before the validation there is nothing to wait for."""
        if (
            self._handlers
            and self._saved_step == trainer.global_step
            and trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        ):
            raise Interrupted(self._signum or signal.SIGTERM, self.path(trainer))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore_signals()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore_signals()

    def path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / f"step-{trainer.global_step:08d}"

    def save(self, trainer: L.Trainer) -> None:
        if self._saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(self.path(trainer))
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_others(trainer)

    def _remove_others(self, trainer: L.Trainer) -> None:
        found = find_checkpoints(self.path(trainer).parent)
        for path in found[: max(0, len(found) - self.keep)] if self.keep else []:
            trainer.strategy.checkpoint_io.remove_checkpoint(path)

    def _repeat_lost_validation(self, trainer: L.Trainer) -> None:
        """A validation that a kill ended is done first. Lightning would leave it out: its checkpoint is older."""
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting or not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return
        done = MetricsFile(Path(trainer.default_root_dir)).has_validation(trainer.global_step)
        if not trainer.strategy.broadcast(done):
            loop.val_loop.restarting = False
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            self._restore_signals()
            raise KeyboardInterrupt
        self._signum = signum
        if rank_zero_only.rank == 0:
            # Not through sys.stderr: the signal may have come in the middle of a write to it, which takes no second.
            os.write(STDERR, b"\nstopping after this step; press Ctrl-C again to quit at once\n")

    def _restore_signals(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


class ForgetLater(L.Callback):
    """Removes, when training starts, the checkpoints of steps that it will come by again, and what a kill left behind.

    It has to stand before the callbacks that drop what was logged at those steps: a kill in between must not leave a
    checkpoint without its log.
    """

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        for path in reversed(find_checkpoints(folder)):  # a kill here leaves no gap
            if step_of(path) > trainer.global_step:
                remove_folder(path)
        remove_leftovers(folder.parent)


def remove_leftovers(out: Path) -> None:
    """Removes what killed processes left of outputs of the run in `out`."""
    for folder in (out / "checkpoints", out):
        remove_unfinished(folder)


class WholeFolderIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it; a full disk or a broken file is told in one line."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with whole_folder(Path(path)) as unfinished:
                save_snapshot(checkpoint, unfinished)
        except OSError as error:
            raise UserError(
                f"cannot save {path}: {error.strerror}; earlier checkpoints are whole: free some space, then continue "
                "with --resume last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_folder(Path(path))


def read_checkpoint(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """A checkpoint on the CPU, once all its files have been found whole. UserError for a damaged or a foreign one."""
    check_seal(path)
    try:
        checkpoint = load_tree(path, load_tensors(path) if tensors else None)
    except FileNotFoundError as error:
        raise UserError(f"{path} is no checkpoint of a training run: it has no {Path(error.filename).name}") from error
    if not {"loops", "state_dict", "zoo_config"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of a training run; give a folder of a run's checkpoints")
    return checkpoint


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name).group(1))


def checkpoint_to_resume(resume: str | Path, out: Path) -> Path:
    """The checkpoint that `--resume` means: a path, or `last` for the newest whole one in the run's folder."""
    if str(resume) != "last":
        path = Path(resume)
        if not path.exists():
            raise UserError(f"--resume {resume}: no such checkpoint; give one, or `last` for the newest in {out}")
        try:
            read_checkpoint(path, tensors=False)
        except UserError as error:
            raise UserError(f"--resume: {error}; give another checkpoint, or `last`") from error
        return path
    found = find_checkpoints(out / "checkpoints")
    if not found:
        raise UserError(f"{out} holds no checkpoint to resume from; leave out --resume to start the run")
    for path in reversed(found):
        try:
            read_checkpoint(path, tensors=False)
        except UserError as error:
            if path == found[0]:
                raise UserError(f"{error}, and there is no other one; start the run anew, in another --out") from error
            _warn(f"{error}; going back to the one before")
        else:
            return path
    raise AssertionError("the loop returns or raises")


@rank_zero_only
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether this is how a collective of torch.distributed ends when another process is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
