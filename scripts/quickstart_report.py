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
from lm_zoo.train.linearize.report import NAMES

# In a pipe rich would fold the table at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Result:
    name: str
    parameters: int
    validation_loss: float  # nats per token of the held-out text
    bits_per_byte: float
    training_tokens: int
    training_tokens_per_second: float
    contexts: tuple[int, ...]  # at which the next two are measured
    decode_tokens_per_second: tuple[float, ...]
    state_bytes: tuple[int, ...]
    sample: str

    def facts(self) -> dict[str, str]:
        """Its column of the table: what is measured -> the number."""
        decoding = zip(self.contexts, self.decode_tokens_per_second, strict=True)
        states = zip(self.contexts, self.state_bytes, strict=True)
        return {
            "parameters": f"{self.parameters:,}",
            "validation loss (nats per token)": f"{self.validation_loss:.3f}",
            "bits per byte": f"{self.bits_per_byte:.3f}",
            "training tokens": f"{self.training_tokens:,}",
            "training tokens/s": f"{self.training_tokens_per_second:,.0f}",
            **{f"decode tokens/s at context {context:,}": f"{speed:,.0f}" for context, speed in decoding},
            **{f"bytes of state at context {context:,}": f"{size:,}" for context, size in states},
        }


@dataclass(frozen=True)
class Linearization:
    """What the report of a linearization says, as far as it is shown here."""

    window: int
    tokens: int  # held-out ones that perplexity is measured on
    perplexity: dict[str, float]
    gap_closed: float | None

    @classmethod
    def of(cls, report: dict) -> Linearization:
        options, tokens = report["spec"]["options"], report["spec"]["measure_tokens"]
        measured = min(tokens, report["held_out_tokens"])
        return cls(options["window"], measured, report["perplexity"], report["gap_closed"])

    def rows(self) -> list[list[str]]:
        return [[name, f"{self.perplexity[key]:.1f}"] for key, name in NAMES.items() if key in self.perplexity]

    @property
    def title(self) -> str:
        return f"perplexity on {self.tokens:,} held-out tokens"


def human_bytes(size: int) -> str:
    for unit, scale in (("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def table_rows(results: list[Result]) -> list[list[str]]:
    """A row per measure, a column per model: narrow enough for any terminal."""
    measures = [result.facts() for result in results]
    return [[name, *(facts[name] for facts in measures)] for name in measures[0]]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rows = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_report(results: list[Result], linearization: Linearization, folder: Path) -> None:
    found = {"models": [asdict(result) for result in results], "linearization": asdict(linearization)}
    write_json(folder / "results.json", found)
    first = markdown(["model", *(result.name for result in results)], table_rows(results))
    second = markdown(["linearizing the transformer", linearization.title], linearization.rows())
    write_atomically(folder / "table.md", f"{first}\n{second}".encode())


def print_report(
    results: list[Result], linearization: Linearization, folder: Path, *, context: int, seconds: float
) -> None:
    for result in results:
        console.print(Panel(escape(result.sample), title=f"{result.name} continues a prompt", title_align="left"))
    table = Table("model", box=box.ROUNDED)
    for result in results:
        table.add_column(result.name, justify="right")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    table = Table("linearizing the transformer", linearization.title, box=box.ROUNDED)
    table.columns[1].justify = "right"
    for row in linearization.rows():
        table.add_row(*row)
    console.print(table)

    gla, transformer, student = results
    short, long = gla.contexts
    console.print(
        f"""\
The first two models read the same tokens in the same order; they differ in one kind of layer. The transformer keeps \
every key and value, {human_bytes(transformer.state_bytes[0])} after {short:,} tokens and \
{human_bytes(transformer.state_bytes[1])} after {long:,}, and each new token looks at all of them. GLA folds the text \
into a state of {human_bytes(gla.state_bytes[1])} however long it gets. The third is the transformer, linearized: \
its attention gave way to a window of {linearization.window} tokens and a linear state, \
{human_bytes(student.state_bytes[1])} in all, that learned to do the same. The second table says what each step was \
worth, and what the window would be alone.

Loss and bits per byte: held-out text in windows of {context} tokens. State: of one text, in float32. \
All of it took {seconds / 60:.1f} minutes. In [bold]{folder}[/bold] are gla/, transformer/ and linearized/, which \
AutoModelForCausalLM loads, loss.png, table.md, results.json and linearized/report.html. Try next:
""",
        highlight=False,
    )
    commands = f"""\
  source .venv/bin/activate
  lm-zoo generate {folder}/gla --prompt "def main("
  lm-zoo eval perplexity {folder}/transformer --text {folder}/heldout.txt --context {context}
  lm-zoo linearize {folder}/transformer --output runs/linear --text {folder}/training/train.txt --preset hedgehog
  lm-zoo train --config gla-tiny --data.files YOUR.txt --out runs/mine
  lm-zoo list"""
    console.print(commands, highlight=False, soft_wrap=True)


def draw_losses(metrics: Mapping[str, list[dict[str, str]]], path: Path, *, tokens_per_step: int) -> None:
    """Loss over tokens: thin lines for training, thick ones with dots for validation, one colour per model."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lowest = []
    for (name, lines), color in zip(metrics.items(), ("#0f766e", "#c2410c"), strict=True):
        for column, style in (
            ("train_loss", {"linewidth": 1, "alpha": 0.35}),
            ("val_loss", {"linewidth": 2, "marker": "o", "markersize": 4, "label": name}),
        ):
            points = [(int(line["step"]) * tokens_per_step, float(line[column])) for line in lines if line[column]]
            axes.plot(*zip(*points, strict=True), color=color, **style)
            lowest.append(min(loss for _, loss in points))
    axes.set_ylim(min(lowest) - 0.3, 8.5)  # guessing among 4,096 tokens is a loss of 8.3
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Same size, same tokens: held-out loss (dots) and training loss (thin)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
