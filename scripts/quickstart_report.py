"""What the quickstart shows: samples, one table, one picture, and a few words on what they mean."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lm_zoo.eval.report import write_atomically, write_json

# In a pipe rich would fold the table at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Result:
    name: str
    parameters: int
    validation_loss: float  # nats per token of the held-out text
    bits_per_byte: float
    training_tokens_per_second: float
    contexts: tuple[int, ...]  # at which the next two are measured
    decode_tokens_per_second: tuple[float, ...]
    state_bytes: tuple[int, ...]
    sample: str

    def cells(self) -> dict[str, str]:
        """The row of the table: column -> text."""
        return {
            "model": self.name,
            "parameters": f"{self.parameters:,}",
            "validation loss": f"{self.validation_loss:.3f}",
            "bits per byte": f"{self.bits_per_byte:.3f}",
            "training tokens/s": f"{self.training_tokens_per_second:,.0f}",
            **{
                f"decode tokens/s at {context:,}": f"{speed:,.0f}"
                for context, speed in zip(self.contexts, self.decode_tokens_per_second, strict=True)
            },
            **{
                f"state at {context:,}": human_bytes(size)
                for context, size in zip(self.contexts, self.state_bytes, strict=True)
            },
        }


def human_bytes(size: int) -> str:
    for unit, scale in (("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def markdown(results: list[Result]) -> str:
    header = list(results[0].cells())
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *(result.cells().values() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_report(results: list[Result], folder: Path) -> None:
    write_json(folder / "results.json", [asdict(result) for result in results])
    write_atomically(folder / "table.md", markdown(results).encode())


def print_report(results: list[Result], folder: Path, *, context: int, seconds: float) -> None:
    for result in results:
        console.print(Panel(escape(result.sample), title=f"{result.name} continues a prompt", title_align="left"))
    table = Table(box=box.ROUNDED, padding=(0, 1))
    for column in results[0].cells():
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column == "model")
    for result in results:
        table.add_row(*result.cells().values())
    console.print(table)

    gla, transformer = results
    short, long = gla.contexts
    console.print(
        f"""\
Both models read the same tokens in the same order, for {seconds / 60:.1f} minutes in all. They differ in one layer.
The transformer keeps every key and value: {human_bytes(transformer.state_bytes[0])} after {short:,} tokens, \
{human_bytes(transformer.state_bytes[1])} after {long:,}, and each new token looks at them all.
GLA folds the text into a state of fixed size, {human_bytes(gla.state_bytes[1])}, \
so its millionth token costs what its first one did.
(Loss and bits per byte: held-out text in windows of {context} tokens. State: one text, float32.)

In [bold]{folder}[/bold]: gla/ and transformer/ for AutoModelForCausalLM, loss.png, table.md. Try next:

  source .venv/bin/activate
  lm-zoo generate {folder}/gla --prompt "def main("
  lm-zoo eval perplexity {folder}/transformer --text {folder}/heldout.txt --context {context}
  lm-zoo train --config gla-tiny --data.files YOUR.txt --out runs/mine
  lm-zoo list""",
        highlight=False,
    )


def draw_losses(metrics: Mapping[str, list[dict[str, str]]], path: Path) -> None:
    """Loss over tokens: thin lines for training, thick ones with dots for validation, one colour per model."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lowest, colors = [], {"gla": "#0f766e", "transformer": "#c2410c"}
    for name, lines in metrics.items():
        training, validation = curve(lines, "train_loss"), curve(lines, "val_loss")
        axes.plot(*training, color=colors[name], linewidth=1, alpha=0.35)
        axes.plot(*validation, color=colors[name], linewidth=2, marker="o", markersize=4, label=name)
        axes.annotate(
            f"{validation[1][-1]:.2f}", (validation[0][-1], validation[1][-1]), color=colors[name],
            xytext=(6, 0), textcoords="offset points", va="center",
        )  # fmt: skip
        lowest.append(min(validation[1]))
    axes.set_ylim(min(lowest) - 0.5, 8.5)
    axes.margins(x=0.08)
    axes.set_xlabel("training tokens (thousands)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        "Same size, same tokens, same order: held-out loss (dots) and training loss", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())


def curve(lines: list[dict[str, str]], column: str) -> tuple[list[float], list[float]]:
    """(thousands of tokens, values) of one column; a line of validation comes after the line that counts its tokens."""
    tokens, xs, ys = 0.0, [], []
    for line in lines:
        tokens = float(line["tokens"] or tokens)
        if line[column]:
            xs.append(tokens / 1000)
            ys.append(float(line[column]))
    return xs, ys
