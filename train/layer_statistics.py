"""How fast the layers forget and how large their states are, at each validation, in `layers.csv` and TensorBoard.

One validation row is read with empty states; training itself pays nothing.
"""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lm_zoo.eval.layer_statistics import layer_statistics
from lm_zoo.files import whole_file
from lm_zoo.train.metrics import read_metrics
from lm_zoo.train.parallel import of_all_parts

LONGEST = 2048  # tokens of the row that are read
COLUMNS = ("step", "layer", "mixer", "mean_decay", "memory_length", "state_norm")


class LayerStatistics(L.Callback):
    """Writes `layers.csv`: a line per validation and recurrent layer, see `layer_statistics`."""

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / "layers.csv"

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not math.isfinite(trainer.callback_metrics["val_loss"]):
            return
        tokens = torch.from_numpy(trainer.datamodule.val_rows[0][0])[None, :LONGEST].to(module.device)
        # In every process: a sharded model needs them all.
        layers = layer_statistics(module.model, tokens, gather=functools.partial(of_all_parts, trainer))
        if layers and trainer.is_global_zero:
            self._write(trainer, layers)

    def _write(self, trainer: L.Trainer, layers: list[dict[str, Any]]) -> None:
        step = trainer.global_step
        lines = read_metrics(self._path) if self._path.exists() else []
        with whole_file(self._path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(line for line in lines if int(line["step"]) < step)  # a resumed run may have been here
            writer.writerows({"step": step, **layer} for layer in layers)
        values = {
            f"layer_{layer['layer']:02d}/{name}": layer[name]
            for layer in layers
            for name in ("mean_decay", "memory_length", "state_norm")
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
