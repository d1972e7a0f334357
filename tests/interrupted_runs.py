"""Runs that end as by a power cut, and what of their log must be the same after a resume."""

import lightning as L

from lm_zoo.train.metrics import read_metrics

OF_THE_MACHINE = ("tokens_per_second", "flops_utilisation", "memory_gb")


class Crash(Exception):
    pass


class CrashAt(L.Callback):
    """Ends the run after `batches` batches, as a power cut would."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == self.batches:
            raise Crash


def curve(out) -> list[dict]:
    """All that was logged, but for what the machine makes of it."""
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in read_metrics(out / "metrics.csv")]
