"""The part of docs/results.md on texts that are longer than those of training, from `scripts/extrapolation.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

RANGES = ((1, 15), (16, 127), (128, 1023), (1024, 2047))  # positions whose loss has a column


def lengths_section(files: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    lines = ["## Longer texts than in training"]
    for path, content in files:
        settings = content["settings"]
        length = settings["length"]
        lines += [
            "",
            f"A small model of each family, trained on the same {settings['training_tokens']:,} tokens of WikiText-2, "
            f"one seed, in texts of {length} tokens, then read longer ones. On the left the perplexity of the same "
            f"test tokens, as the last ones of texts of {length} to {16 * length:,} tokens: what more context does to "
            "them. On the right the perplexity by position in the longest texts.",
            "",
            *_table(content),
            "",
        ]
        beside = path.with_suffix(".md")
        if beside.exists():
            lines += [beside.read_text(encoding="utf-8").strip(), ""]
        lines += [
            f"`{content['command']}` at commit {content['commit']}: {settings['num_hidden_layers']} layers, "
            f"d = {settings['hidden_size']}, {settings['vocab_size']:,} tokens of byte pairs, {settings['steps']} "
            f"steps of {settings['batch_size']} texts at a learning rate of {settings['learning_rate']:g}, seed "
            f"{settings['seed']}; torch {content['torch']}, {content['device']}, one thread; "
            f"{content['minutes']:.0f} minutes of training, on a machine with other work.",
            "",
            f"Published: {content['published']}",
        ]
        for name, title in (("", "Perplexity by length"), ("-positions", "Perplexity by position")):
            lines += ["", f"![{title}](results/{path.stem}{name}.png)"]
    return lines


def _table(content: dict[str, Any]) -> list[str]:
    rows = sorted(content["models"].items(), key=lambda item: item[1]["by_length"][0]["nats"])
    lengths = [point["tokens"] for point in rows[0][1]["by_length"]]
    head = ["model", "parameters", *(f"{n:,}" for n in lengths), "16 x / 1 x", *(f"at {a:,}-{b:,}" for a, b in RANGES)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for name, model in rows:
        points = model["by_length"]
        cells = [f"`{name}`", f"{model['parameters']:,}", *(f"{point['perplexity']:.2f}" for point in points)]
        cells.append(f"{math.exp(points[-1]['nats'] - points[0]['nats']):.3f}")
        cells += [f"{math.exp(_mean(model['by_position'], *span)):.1f}" for span in RANGES]
        lines.append(_row(cells))
    return lines


def _mean(bins: list[dict[str, Any]], first: int, last: int) -> float:
    """The loss of positions `first` to `last`, where bins begin and end."""
    inside = [(part["last"] - part["first"] + 1, part["nats"]) for part in bins if first <= part["first"] <= last]
    return sum(count * nats for count, nats in inside) / sum(count for count, _ in inside)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
