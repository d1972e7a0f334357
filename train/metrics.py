"""What is measured in a run: losses, gradients and speed, in `metrics.csv`, in TensorBoard and in pictures."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm_zoo.eval.flops import TRAINING_PASSES, flops_per_token, peak_flops
from lm_zoo.files import whole_file
from lm_zoo.train.memory import peak_memory
from lm_zoo.train.parallel import data_process


class Metrics(L.Callback):
    """Logs every `trainer.log_every_n_steps` optimizer steps, and after each validation.

    Sums stay on the device in between: a GPU is waited for only when something is logged. `latest` holds the newest
    values as numbers. Skipped steps are in no mean.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._run_tokens = 0  # over all processes
        self._since = [0.0, 0.0]  # sum of losses and number of targets since the last log, over all processes
        self._tokens = 0  # since the last log, over all processes

    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run_tokens, "since": [float(sum_) for sum_ in self._since], "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._run_tokens, self._since, self._tokens = state["run"], state["since"], state["tokens"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step
        dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else torch.float32
        dtype = torch.float16 if trainer.precision.startswith("16") else dtype
        self._flops_per_token = TRAINING_PASSES * flops_per_token(module.model, trainer.datamodule.seq_len)
        self._peak = peak_flops(module.device, dtype)
        self._start_clock()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs: dict, batch: dict, batch_idx: int) -> None:
        tokens = batch["input_ids"].numel()
        tokens *= data_process(trainer)[1]
        self._tokens += tokens
        self._clocked_tokens += tokens
        self._batch_end = time.monotonic()
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulation
        self._step = step
        latest = module.step_metrics
        taken = latest["skipped"] == 0
        for i, name in enumerate(("loss_sum", "targets")):
            self._since[i] = self._since[i] + torch.where(taken, latest[name], 0.0)
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._log_training(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module, batch: dict, batch_idx: int) -> None:
        if self._paused:
            self._clock += time.monotonic() - self._batch_end
            self._paused = False

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._paused = True  # tokens/s is the speed of training alone

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._paused = True
        names = ("val_loss", "val_bits_per_byte", "val_perplexity")
        values = {name: trainer.callback_metrics[name].item() for name in names if name in trainer.callback_metrics}
        self._log(trainer, values)

    def _log_training(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        latest = module.step_metrics
        loss, targets, norm = torch.stack([*self._since, latest["gradient_norm"].to(self._since[0])]).tolist()
        counts = module.guard.read(trainer.global_step)
        speed = self._clocked_tokens / (time.monotonic() - self._clock)  # of all processes
        self._run_tokens += self._tokens
        values = {"tokens": self._run_tokens}
        if targets > 0:
            values["train_loss"] = loss / targets
            values["train_bits_per_byte"] = loss / targets / math.log(2) * trainer.datamodule.train_tokens_per_byte
        values |= {
            "learning_rate": latest["learning_rate"],
            "gradient_norm": norm,
            "skipped_steps": int(counts["not_finite"] + counts["spikes"]),
            "tokens_per_second": speed,
            "memory_gb": peak_memory(module.device) / 1e9,
        }
        if self._peak is not None:
            values["flops_utilisation"] = speed * self._flops_per_token / (self._peak * trainer.world_size)
        self._log(trainer, values)
        self._since, self._tokens = [0.0, 0.0], 0
        self._start_clock()

    def _log(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _start_clock(self) -> None:
        self._clock = self._batch_end = time.monotonic()
        self._clocked_tokens, self._paused = 0, False


class MetricsFile(Logger):
    """`metrics.csv`: a line per log, of these columns. A resumed run continues it from the step that it resumes at."""

    COLUMNS = (
        "step", "tokens", "train_loss", "train_bits_per_byte", "val_loss", "val_bits_per_byte", "val_perplexity",
        "learning_rate", "gradient_norm", "skipped_steps", "tokens_per_second", "flops_utilisation", "memory_gb",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"

    name = "metrics"
    version = ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = {"step": step, **{name: value for name, value in metrics.items() if name in self.COLUMNS}}
        if len(line) > 1:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(line)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Options are in config.yaml."""

    def has_validation(self, step: int) -> bool:
        lines = read_metrics(self.path) if self.path.exists() else []
        return any(int(line["step"]) == step and line["val_loss"] for line in lines)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`: the run will come by there again."""
        if not self.path.exists():
            return
        lines = [line for line in read_metrics(self.path) if int(line["step"]) <= step]
        with whole_file(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(lines)


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))  # a kill may leave half a line
