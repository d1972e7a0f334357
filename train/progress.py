"""Progress of a run: a Rich bar on a terminal, a line per log elsewhere (a log file, a pipe)."""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm_zoo.train.metrics import Metrics


class StepProgress(ProgressBar):
    """Counts optimizer steps. The numbers beside them are the latest that `Metrics` logged, so showing them is free."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics
        self._bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if not self._enabled:
            return
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("eta"), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console, refresh_per_second=4)
            self._task = self._bar.add_task("", completed=trainer.global_step, total=trainer.max_steps, numbers="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, numbers=self._numbers())
        elif self._enabled and (self._step % trainer.log_every_n_steps == 0 or self._step == trainer.max_steps):
            print(f"step {self._step:,} of {trainer.max_steps:,}: {self._numbers()}", file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, numbers="validating")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._enabled:
            return
        latest = self._metrics.latest
        line = (
            f"step {trainer.global_step:,} of {trainer.max_steps:,}: validation loss {latest['val_loss']:.3f}, "
            f"{latest['val_bits_per_byte']:.3f} bits per byte"
        )
        if self._bar is not None:
            self._bar.update(self._task, numbers=self._numbers())
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _numbers(self) -> str:
        latest = self._metrics.latest
        if "train_loss" not in latest:
            return ""
        numbers = [
            f"loss {latest['train_loss']:.3f}",
            f"{latest['train_bits_per_byte']:.3f} bits/byte",
            f"{latest['tokens_per_second']:,.0f} tokens/s",
        ]
        if "flops_utilisation" in latest:
            numbers.append(f"{latest['flops_utilisation']:.0%} of peak")
        if latest["skipped_steps"]:
            numbers.append(f"{latest['skipped_steps']} skipped")
        return "  ".join(numbers)
