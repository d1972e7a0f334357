"""What the model writes, at each validation, in `samples.txt` and TensorBoard."""

from __future__ import annotations

import math
import re
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lm_zoo.eval.generation import generate
from lm_zoo.files import whole_file

HEADING = re.compile(rb"^--- step (\d+)$", re.MULTILINE)
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
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled again, for one token
            # In all processes, as the model may be sharded.
            text = generate(module.model, module.tokenizer, prompt, max_tokens=TOKENS)
        if trainer.is_global_zero:
            self._write(trainer.global_step, text)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("sample", text, trainer.global_step)

    def _write(self, step: int, text: str) -> None:
        samples = self._path.read_bytes() if self._path.exists() else b""
        for heading in HEADING.finditer(samples):
            if int(heading[1]) >= step:  # a resumed run may have been here
                samples = samples[: heading.start()]
                break
        with whole_file(self._path) as unfinished:
            unfinished.write_bytes(samples + f"--- step {step}\n{text}\n".encode())
