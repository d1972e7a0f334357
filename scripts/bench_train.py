"""Tokens/s of `lm-zoo train` against a bare PyTorch loop over the same model and batches.

    python scripts/bench_train.py --json docs/bench_train.json

One run trains with everything that `lm-zoo train` does by default: the data module, checks of every step, clipping,
schedule, metrics, TensorBoard, progress, plots. After every few of its steps it is stopped for as many steps of the
bare loop, with its own copy of the model, on the same batches: forward, backward, clipping and a fused AdamW, nothing
else. So both meet the same drift of the machine's speed. What is printed are medians over the turns.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from lm_zoo.eval.report import write_json
from lm_zoo.train import TextData, ZooModule, fit
from lm_zoo.train.optim import parameter_groups

MODELS = ("gla-tiny", "gated-deltanet-tiny", "mamba2-tiny", "transformer-tiny")
WARM_UP = 5  # steps before the first turn


@dataclass(frozen=True)
class Speed:
    model: str
    bare_tokens_per_second: float
    trainer_tokens_per_second: float
    ratio: float  # median over the turns of the trainer's speed over the bare loop's
    ratio_low: float  # quartiles
    ratio_high: float


class Turns(L.Callback):
    """Times the trainer's steps and the bare loop's in turn."""

    def __init__(self, turns: int, steps: int) -> None:
        self.turns, self.steps = turns, steps
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._batches: list[dict] = []

    def on_train_start(self, trainer: L.Trainer, module: ZooModule) -> None:
        self._model = copy.deepcopy(module.model)
        groups = parameter_groups(self._model, module.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, **module.optimizer_options, fused=True)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch: dict, batch_idx: int) -> None:
        self._batches.append(batch)
        if trainer.global_step < WARM_UP or len(self._batches) < self.steps:
            return
        if hasattr(self, "_start"):
            synchronize(module.device)
            self.trainer_seconds.append(time.perf_counter() - self._start)
            start = time.perf_counter()
            self._run_bare(trainer.precision_plugin.forward_context)
            synchronize(module.device)
            self.bare_seconds.append(time.perf_counter() - start)
        self._batches = []
        self._start = time.perf_counter()

    def _run_bare(self, context) -> None:
        for batch in self._batches:
            self._optimizer.zero_grad()
            with context():
                loss = self._model(batch["input_ids"], labels=batch["labels"], cu_seqlens=batch["cu_seqlens"]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(model: str, folder: Path, arguments: argparse.Namespace) -> Speed:
    L.seed_everything(0, verbose=False)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(500)]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(generator.choices(words, k=generator.randint(20, 400))) for _ in range(2000)))
    turns = Turns(arguments.turns, arguments.steps)
    data = TextData(
        str(text), separator="\n", seq_len=arguments.seq_len, batch_size=arguments.batch_size, val_fraction=0,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    fit(
        ZooModule(model), data, folder / model, callbacks=[turns], precision=arguments.precision, devices=1,
        max_steps=WARM_UP + arguments.steps * (arguments.turns + 2),
    )  # fmt: skip
    tokens = arguments.steps * arguments.batch_size * arguments.seq_len
    ratios = sorted(b / t for b, t in zip(turns.bare_seconds, turns.trainer_seconds, strict=True))
    return Speed(
        model,
        tokens / median(turns.bare_seconds),
        tokens / median(turns.trainer_seconds),
        median(ratios),
        ratios[len(ratios) // 4],
        ratios[-1 - len(ratios) // 4],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="presets")
    parser.add_argument("--turns", type=int, default=15, help="how often the two are timed")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each in a turn")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per row")
    parser.add_argument("--precision", default="32-true", help="of lightning's Trainer, for example bf16-mixed")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(model, Path(folder), arguments))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    table = Table("model", "bare tokens/s", "lm-zoo train tokens/s", "ratio", "quartiles", title=device)
    for row in rows:
        speeds = (f"{row.bare_tokens_per_second:,.0f}", f"{row.trainer_tokens_per_second:,.0f}")
        table.add_row(row.model, *speeds, f"{row.ratio:.3f}", f"{row.ratio_low:.3f} to {row.ratio_high:.3f}")
    Console(width=120).print(table)
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name not in ("models", "json")}
        found = {"torch": torch.__version__, "device": device, **options}
        write_json(arguments.json, found | {"speeds": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
