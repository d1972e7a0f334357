"""The pictures of a run, drawn from `metrics.csv` while it goes on: `loss.png` and `learning_rate.png`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm_zoo.files import whole_file
from lm_zoo.train.metrics import read_metrics

SECONDS = 60  # between drawings, which take a fraction of a second


class Plots(L.Callback):
    """Draws the pictures once a minute, after each validation and at the end of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._drawn = time.monotonic()

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if time.monotonic() - self._drawn > SECONDS:
            self.draw()

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.draw()

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.draw()

    def draw(self) -> None:
        metrics = self.folder / "metrics.csv"
        plot_losses({"": metrics}, self.folder / "loss.png")
        plot_learning_rate(metrics, self.folder / "learning_rate.png")
        self._drawn = time.monotonic()


def plot_losses(runs: Mapping[str, Path], picture: Path) -> None:
    """Training and validation loss over tokens, for one or several runs: name -> its metrics.csv."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.2))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.97)
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)")
    for index, (name, path) in enumerate(runs.items()):
        lines = read_metrics(path) if path.exists() else []
        for column, what, style in [
            ("train_loss", "training", {"alpha": 0.5, "linewidth": 1}),
            ("val_loss", "validation", {"marker": "o", "markersize": 4}),
        ]:
            points = _curve(lines, column)
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{index}", label=f"{name} {what}".strip(), **style)
    if axes.lines:
        axes.legend()
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    with whole_file(picture) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def plot_learning_rate(metrics: Path, picture: Path) -> None:
    """Learning rate, and the norm of the gradients, over tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.2))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.12, top=0.97, hspace=0.08)
    lines = read_metrics(metrics) if metrics.exists() else []
    panels = figure.subplots(2, 1, sharex=True)
    for axes, column, what in zip(
        panels, ("learning_rate", "gradient_norm"), ("learning rate", "gradient norm"), strict=True
    ):
        points = _curve(lines, column)
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    panels[1].set_xlabel("tokens")
    panels[1].xaxis.set_major_formatter(EngFormatter())
    with whole_file(picture) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def _curve(lines: list[dict[str, str]], column: str) -> list[tuple[float, float]]:
    """(tokens, value) wherever the column has one; a line without a count of tokens has that of the line before."""
    points, tokens = [], 0.0
    for line in lines:
        tokens = float(line["tokens"] or tokens)
        if line[column]:
            points.append((tokens, float(line[column])))
    return points
