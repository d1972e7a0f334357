"""What the processes of `train/test_parallel.py` do: `ranks_of_a_run.py OUT TEXT JSON`, as by torchrun.

Trains as JSON says and leaves, beside what any run leaves, the loss of each step in `OUT/losses.json`.
"""

import json
import sys
from pathlib import Path

import lightning as L
import torch
from forked_ranks import as_by_torchrun
from lightning.pytorch.plugins import DoublePrecision

from lm_zoo.train import Checkpoints, Parallel, TextData, ZooModule, fit

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "tie_word_embeddings": True,
    "mixers": {"gla": {"num_heads": 2, "gate_rank": 4}, "attention": {"num_heads": 2}},
    "pattern": ["gla", "attention"],
}  # fmt: skip


class Losses(L.Callback):
    """The loss of each step, over all processes, and the gradient's norm."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args) -> None:
        if trainer.global_step == self._step:
            return
        self._step, step = trainer.global_step, module.step_metrics
        self.steps.append([(step["loss_sum"] / step["targets"]).item(), step["gradient_norm"].item()])


def train(out: Path, text: Path, *, parallel=None, model=None, data=None, every_n_steps=1000, **options):
    L.seed_everything(0, verbose=False)
    losses = Losses()
    rows = TextData(
        str(text), separator="\n", cache_dir=str(text.parent / "cache"),
        **{"seq_len": 16, "batch_size": 4, "val_fraction": 0, **(data or {})},
    )  # fmt: skip
    module = ZooModule(**{"config": CONFIG, "warmup": 0.0, "z_loss": 0.01, **(model or {})})
    fit(
        module, rows, out, accelerator="cpu", callbacks=[losses], enable_progress_bar=False, log_every_n_steps=1,
        plugins=[DoublePrecision()] if options.pop("double", True) else [],
        checkpoints=Checkpoints(every_n_steps, keep=0),
        parallel=None if parallel is None else Parallel(**parallel), **options,
    )  # fmt: skip
    return losses.steps


def main() -> None:
    out = Path(sys.argv[1])
    steps = train(out, Path(sys.argv[2]), **json.loads(sys.argv[3]))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    as_by_torchrun(main)
