"""Checkpoints: whole or not at all, at the borders of optimizer steps only, and one when the run is interrupted.

A checkpoint in the middle of an accumulation would lose the gradients gathered so far. Here a save that falls due there
waits for the step, so a resumed run is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm_zoo.errors import UserError
from lm_zoo.files import whole_file

NAME = re.compile(r"step-(\d+)\.ckpt")
STDERR = 2  # its file descriptor


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run after a checkpoint was saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted, and saved {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step-NNN.ckpt` in the run's folder, also before each validation, at the end and on Ctrl-C.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: How many to keep, the newest ones; 0 keeps all.

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
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, self._on_signal)

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
        return Path(trainer.default_root_dir) / "checkpoints" / f"step-{trainer.global_step:08d}.ckpt"

    def save(self, trainer: L.Trainer) -> None:
        if self._saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(self.path(trainer))
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_others(trainer)

    def _remove_others(self, trainer: L.Trainer) -> None:
        newest = self.path(trainer)
        found = find_checkpoints(newest.parent)
        count = found.index(newest) + 1
        superseded = found[: max(0, count - self.keep)] if self.keep else []
        for path in superseded + found[count:]:
            trainer.strategy.checkpoint_io.remove_checkpoint(path)

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


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it; a full disk or a broken file is told in one line."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with whole_file(Path(path)) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch.save's own error hides it
            if not isinstance(reason, OSError):
                raise
            raise UserError(
                f"cannot save {path}: {reason.strerror}; earlier checkpoints are whole: free some space, then continue "
                "with --resume last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """A checkpoint on the CPU; `lazily` maps the tensors without reading them."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except OSError:
        raise
    except Exception as error:  # unpickling garbage can raise anything
        raise UserError(f"{path} is damaged, or no checkpoint ({type(error).__name__}); resume from another") from error
    if not isinstance(checkpoint, dict) or not {"loops", "state_dict", "zoo_config"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of a training run; give a file of a run's checkpoints folder")
    return checkpoint


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name).group(1)))


def checkpoint_to_resume(resume: str | Path, out: Path) -> Path:
    """The file that `--resume` means: a path, or `last` for the newest checkpoint in the run's folder."""
    if str(resume) == "last":
        found = find_checkpoints(out / "checkpoints")
        if not found:
            raise UserError(f"{out} holds no checkpoint to resume from; leave out --resume to start the run")
        return found[-1]
    path = Path(resume)
    if not path.is_file():
        raise UserError(f"--resume {resume}: no such file; give a checkpoint, or `last` for the newest in {out}")
    return path
