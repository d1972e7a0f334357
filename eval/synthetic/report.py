"""What a sweep found: a table on the screen, the same as CSV and JSON, and a picture."""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_zoo.eval.machine import machine
from lm_zoo.eval.report import write_atomically, write_json
from lm_zoo.eval.synthetic.picture import draw
from lm_zoo.eval.synthetic.plan import Plan, Run
from lm_zoo.eval.synthetic.sweep import Result, due, score


class Progress:
    """A line for every run that ends."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def __call__(self, run: Run, result: Result) -> None:
        accuracies = " ".join(f"{value:.3f}" for value in result["accuracy"])
        print(
            f"[{self.minutes:4.1f} min] {run.mixer} d={run.hidden_size} lr={run.learning_rate:g} "
            f"seed={run.seed}: {accuracies} after {result['steps']:,} steps, {result['seconds']:.0f} s",
            flush=True,
        )


def write_report(plan: Plan, results: dict[str, Result], folder: Path, *, minutes: float) -> str:
    """results.json, results.csv and results.png in `folder`; returns the table for the screen.

    The `minutes` of this sweep come on top of those that an earlier one in this folder took.
    """
    rows = summary(plan, results)
    done = [(run, results[run.name]) for run in due(plan, results) if run.name in results]
    content = {
        "kind": "synthetic",
        "task": plan.name,
        "title": plan.title,
        "budget": plan.budget_name,
        "against": plan.against,
        "published": plan.published,
        "chance": chance(plan),
        "tests": part_names(plan.budget.test),
        "lengths": [part["length"] for part in plan.budget.test],
        "settings": asdict(plan.budget) | {"sizes": plan.sizes, "model": plan.model | plan.budget.model},
        "mixers": plan.mixers,
        "command": command(plan),
        **machine(plan.budget.device),
        "jobs": plan.budget.jobs,
        "minutes": round(minutes + earlier_minutes(folder / "results.json"), 1),
        "run_minutes": round(sum(result["seconds"] for _, result in done) / 60, 1),
        "rows": rows,
    }
    write_json(folder / "results.json", content)
    write_csv(folder / "results.csv", [_line(run, result, plan) for run, result in done])
    draw(content, folder / "results.png")
    return table(plan, rows)


def summary(plan: Plan, results: dict[str, Result]) -> list[dict[str, Any]]:
    """A row for each mixer and hidden size: all seeds at the learning rate that did best in the search."""
    rows = []
    for mixer in plan.mixers:
        for size in plan.budget.hidden_sizes:
            runs = [run for run in due(plan, results) if (run.mixer, run.hidden_size) == (mixer, size)]
            done = [run for run in runs if run.name in results]
            if not done:
                rows.append({"mixer": mixer, "hidden_size": size, "seeds": 0})
                continue
            best = max((run for run in done if run.seed == 0), key=lambda run: score(results[run.name]))
            found = [results[run.name] for run in done if run.learning_rate == best.learning_rate]
            accuracies = [result["accuracy"] for result in found]
            rows.append(
                {
                    "mixer": mixer,
                    "hidden_size": size,
                    "seeds": len(found),
                    "layers": best.model["num_hidden_layers"],
                    "learning_rate": best.learning_rate,
                    "parameters": found[0]["parameters"],
                    "state": found[0]["state"],
                    "accuracy": [round(statistics.median(column), 4) for column in zip(*accuracies, strict=True)],
                    "worst": [min(column) for column in zip(*accuracies, strict=True)],
                    "best": [max(column) for column in zip(*accuracies, strict=True)],
                    "steps": [result["steps"] for result in found],
                    "seconds": [result["seconds"] for result in found],
                }
            )
    return rows


def earlier_minutes(path: Path) -> float:
    return json.loads(path.read_text(encoding="utf-8"))["minutes"] if path.exists() else 0.0


def part_names(parts: Sequence[dict[str, Any]]) -> list[str]:
    """What the parts of a test are called: their lengths, and the sizes in which they differ."""

    def name(part: dict[str, Any]) -> str:
        own = [key for key in part if key not in ("length", "count") and any(p.get(key) != part[key] for p in parts)]
        return ", ".join([f"{part['length']:,} tokens", *(f"{key} {part[key]}" for key in own)])

    return [name(part) for part in parts]


def chance(plan: Plan) -> float:
    run = plan.run(next(iter(plan.mixers)), plan.budget.hidden_sizes[0], plan.budget.learning_rates[0], 0)
    return run.task_of(plan.budget.test[0]).chance


def command(plan: Plan) -> str:
    """The command that makes these runs, whatever folder they went to."""
    words = ["lm-zoo", "eval", "synthetic", "--task", plan.name, "--budget", plan.budget_name]
    if plan.chosen:
        words += ["--mixers", ",".join(plan.mixers)]
    return shlex.join(words)


def _line(run: Run, result: Result, plan: Plan) -> dict[str, Any]:
    tests = zip(part_names(plan.budget.test), result["accuracy"], strict=True)
    return {
        "mixer": run.mixer,
        "hidden_size": run.hidden_size,
        "layers": run.model["num_hidden_layers"],
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        **{key: result[key] for key in ("parameters", "state", "steps", "seconds", "loss")},
        "validation": round(score(result), 4),
        **dict(tests),
    }


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    write_atomically(path, text.getvalue().encode())


def table(plan: Plan, rows: list[dict[str, Any]]) -> str:
    """The medians over the seeds, one line for each row; tabs between columns where nobody looks."""
    head = ["mixer", "d", "layers", "state", "lr", "seeds", *part_names(plan.budget.test)]
    lines = [head]
    for row in rows:
        values = [row["mixer"], str(row["hidden_size"])]
        if row["seeds"]:
            values += [str(row["layers"]), f"{row['state']:,}", f"{row['learning_rate']:g}", str(row["seeds"])]
            values += [f"{value:.3f}" for value in row["accuracy"]]
        else:
            values += ["not run"]
        lines.append(values + [""] * (len(head) - len(values)))
    if not sys.stdout.isatty():
        return "\n".join("\t".join(line) for line in lines)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
