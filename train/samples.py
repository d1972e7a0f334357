"""What the model writes, at each validation, in `samples.txt` and TensorBoard."""

from __future__ import annotations

import math
import re
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lm_zoo.eval.generation import generate

HEADING = re.compile(r"^--- step (\d+)$", re.MULTILINE)
PROMPT_TOKENS = 24
TOKENS = 48


class Samples(L.Callback):
    """Continues the beginning of the validation text, with one seed for all: only the model changes."""

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / "samples.txt"

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not math.isfinite(trainer.callback_metrics["val_loss"]):
            return
        first = trainer.datamodule.val_rows[0][0][:PROMPT_TOKENS]
        prompt = module.tokenizer.decode(first, skip_special_tokens=True)
        if not prompt.strip():
            return
        text = generate(
            module.model, module.tokenizer, prompt, max_tokens=TOKENS
        )  # all processes, as it may be sharded
        if trainer.is_global_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"--- step {trainer.global_step}\n{text}\n")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("sample", text, trainer.global_step)
