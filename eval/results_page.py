"""docs/results.md, written from the JSON files of runs in docs/results: what each model can do, with what it took.

    python scripts/results.py                                   writes the page anew
    python scripts/results.py --add runs/synthetic/parity-cpu   takes a run's files into docs/results first

A file says what `kind` it is, and `SECTIONS` has a function for each kind: contents of all its files -> lines of the
page. Beside NAME.json there may be NAME.png, and NAME.md with remarks of people, which the page takes in as they are.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_zoo.eval.results_lengths import lengths_section

COMMAND = "python scripts/results.py"
FIRST = ("parity", "s3", "mqar", "mqar_states", "induction", "selective_copy")  # of the synthetic tasks


def results_page(folder: Path) -> str:
    """The page of the results in `folder`: the same text for the same files."""
    files: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") not in SECTIONS:
            raise ValueError(f"{path} has kind {content.get('kind')!r}; known: {', '.join(SECTIONS)}")
        files.setdefault(content["kind"], []).append((path, content))
    lines = [
        "# What the models can do, measured",
        "",
        f"<!-- Written by `{COMMAND}` from docs/results: change the runs or their remarks, not this file. -->",
        "",
        "Every table has the command that makes it, the commit, the machine, and what the paper reports. The numbers "
        "are medians over the seeds, with the worst and the best seed in brackets where there are several.",
    ]
    for kind, section in SECTIONS.items():
        if kind in files:
            lines += ["", *section(files[kind])]
    return "\n".join(lines) + "\n"


def synthetic_section(files: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Sweeps of `lm-zoo eval synthetic`, a part for each task."""
    lines = [
        "## Synthetic tasks",
        "",
        "Small models from random weights, trained and tested on texts that are made of a seed. The learning rate is "
        "the best of a search on texts of its own. `state` is how many numbers of 4 bytes the model keeps of a text, "
        "over all layers, convolutions included; attention keeps all keys and values.",
        "",
        "`lm-zoo eval synthetic --task T --mixers a,b,c --budget cpu|gpu|paper` makes such a table of any mixers, for "
        "the tasks in `configs/synthetic`: `cpu` in 20 minutes on two cores, `gpu` on one GPU, `paper` with the sizes "
        "of the paper. A sweep that was killed goes on when the same command is given again.",
    ]
    order = {task: place for place, task in enumerate(FIRST)}
    for path, content in sorted(files, key=lambda file: (order.get(file[1]["task"], len(order)), file[0])):
        lines += ["", f"### {content['title']}", "", *synthetic_table(content), "", *remarks(path)]
        lines += [provenance(content), "", f"Published: {content['published']}", *picture(path, content["title"])]
    return lines


def synthetic_table(content: dict[str, Any]) -> list[str]:
    several = len(content["settings"]["hidden_sizes"]) > 1
    head = ["mixer", *(["d"] if several else []), "layers", "state", "learning rate", "seeds", *content["tests"]]
    lines = [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
    for row in content["rows"]:
        cells = [f"`{row['mixer']}`", *([str(row["hidden_size"])] if several else [])]
        if row["seeds"] == 0:
            lines.append(table_row([*cells, *["not run"] * (len(head) - len(cells))]))
            continue
        cells += [str(row["layers"]), f"{row['state']:,}", f"{row['learning_rate']:g}", str(row["seeds"])]
        for median, worst, best in zip(row["accuracy"], row["worst"], row["best"], strict=True):
            cells.append(f"{median:.3f}" if row["seeds"] == 1 else f"{median:.3f} ({worst:.3f}, {best:.3f})")
        lines.append(table_row(cells))
    lines.append(table_row(["chance", *[""] * (len(head) - 1 - len(content["tests"])), *chances(content)]))
    return lines


def chances(content: dict[str, Any]) -> list[str]:
    return [f"{content['chance']:.3f}"] * len(content["tests"])


def provenance(content: dict[str, Any]) -> str:
    """How to make it again, and what it was made on."""
    sizes = ", ".join(str(size) for size in content["settings"]["hidden_sizes"])
    seconds = statistics.median(second for row in content["rows"] if row["seeds"] for second in row["seconds"])
    times = (
        f"{content['minutes']:.0f} minutes for {content['run_minutes']:.0f} minutes of runs of {seconds:.0f} s (median)"
    )
    return (
        f"`{content['command']}` at commit {content['commit']}: d = {sizes}; torch "
        f"{content['torch']}, {content['device']}, {content['jobs']} runs side by side with one thread each; "
        f"{times}."
    )


def remarks(path: Path) -> list[str]:
    """What people say of a result, from the Markdown file beside it."""
    beside = path.with_suffix(".md")
    return [beside.read_text(encoding="utf-8").strip(), ""] if beside.exists() else []


def picture(path: Path, title: str) -> list[str]:
    beside = path.with_suffix(".png")
    return ["", f"![{title}](results/{beside.name})"] if beside.exists() else []


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


SECTIONS: dict[str, Callable[[list[tuple[Path, dict[str, Any]]]], list[str]]] = {
    "synthetic": synthetic_section,
    "lengths": lengths_section,
}
