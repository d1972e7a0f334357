"""Trains a small model of every family on the same tokens, and reads texts of up to 16 times the training length.

    python scripts/extrapolation.py --train wikitext2-valid.txt --test wikitext2-test.txt --out runs/extrapolation \\
        --json docs/results/extrapolation.json

All have the same width, depth, tokenizer and learning rate, and see the same tokens in the same order; only the mixers
differ. What is measured is that of `lm_zoo.eval.lengths`: the same test tokens with ever more context before them, and
the loss by position. Run again after a kill, it goes on from there: trained models and measured ones are kept.

Beside the JSON, which docs/results.md is written from, come its pictures: by length and, `-positions`, by position.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lm_zoo.errors import is_user_error, one_line
from lm_zoo.eval.inspect_model import tables
from lm_zoo.eval.inspect_plots import draw_lengths, draw_positions
from lm_zoo.eval.lengths import measure_lengths
from lm_zoo.eval.loading import load_model, read_text
from lm_zoo.eval.machine import machine
from lm_zoo.eval.report import write_json
from lm_zoo.layers import MIXERS
from lm_zoo.train import Checkpoints, TextData, ZooModule, fit
from lm_zoo.train.checkpoints import find_checkpoints

LENGTH = 128
SETTINGS: dict[str, Any] = {
    "length": LENGTH,
    "batch_size": 16,
    "steps": 400,
    "training_tokens": 400 * 16 * LENGTH,
    "learning_rate": 4e-3,
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "seed": 0,
}
PUBLISHED = (
    "no paper has this table. Press et al. 2022 (arXiv 2108.12409, figure 1) show softmax attention with rotary "
    "positions getting worse as soon as a text is longer than those of training; Yang, Kautz and Hatamizadeh 2024 "
    "(arXiv 2412.06464) report that Gated DeltaNet extrapolates better than Mamba-2 and DeltaNet."
)
HEADS = {"num_heads": 2}
# Options of the mixers that are not of two heads, and what is beside them in a model.
OPTIONS: dict[str, dict[str, Any]] = {"mamba2": {"head_size": 32, "state_size": 32}, "hgrn": {}, "mamba": {}, "s4d": {}}
MODELS: dict[str, dict[str, Any]] = {
    name: {"mixers": {name: OPTIONS.get(name, HEADS)}, "pattern": [name]} for name in MIXERS
} | {
    "attention, window 32": {"mixers": {"attention": {**HEADS, "window": 32}}, "pattern": ["attention"]},
    "gated_deltanet + attention": {
        "mixers": {"gated_deltanet": HEADS, "attention": HEADS},
        "pattern": ["gated_deltanet", "attention", "gated_deltanet"],
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="UTF-8 text to train on")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="UTF-8 text to read")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the runs")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for the results")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}; or all")
    arguments = parser.parse_args()
    try:
        run(arguments.train, arguments.test, arguments.out, arguments.json, arguments.models or list(MODELS))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"extrapolation: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(train: Path, test: Path, out: Path, results: Path, names: list[str]) -> None:
    text = read_text(test)
    read_text(train)
    command = (
        f"python scripts/extrapolation.py --train {train.name} --test {test.name} --out RUNS --json {results.name}"
    )
    content = {"kind": "lengths", "command": command, "settings": SETTINGS, "published": PUBLISHED, "models": {}}
    if results.exists():
        content["models"] = json.loads(results.read_text(encoding="utf-8"))["models"]
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in content["models"]:
            content["models"][name] = measure(name, train, text, out)
            write_json(results, content)
        row = content["models"][name]
        print(f"{name:<28}", *(f"{point['perplexity']:9.2f}" for point in row["by_length"]), flush=True)
    models = content["models"] = {name: content["models"][name] for name in MODELS if name in content["models"]}
    content["minutes"] = sum(row["training_seconds"] for row in models.values()) / 60
    write_json(results, content | machine("cpu"))
    draw_lengths(models, results.with_suffix(".png"))
    draw_positions(models, results.with_name(f"{results.stem}-positions.png"))


def measure(name: str, train: Path, text: str, out: Path) -> dict[str, Any]:
    """Of a model that is trained first, unless it was."""
    folder = out / name.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
    start = time.monotonic()
    if not (folder / "model").is_dir():
        train_model(name, train, folder)
    seconds = time.monotonic() - start
    model, tokenizer = load_model(folder / "model")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    sizes = {"parameters": sum(weight.numel() for weight in model.parameters()), "training_seconds": round(seconds, 1)}
    return {**sizes, **tables(measure_lengths(model, ids, LENGTH))}


def train_model(name: str, text: Path, folder: Path) -> None:
    torch.manual_seed(SETTINGS["seed"])
    sizes = {key: SETTINGS[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")}
    module = ZooModule(config={**sizes, **MODELS[name]}, learning_rate=SETTINGS["learning_rate"])
    data = TextData(
        files=str(text),
        tokenizer="bpe",
        vocab_size=SETTINGS["vocab_size"],
        seq_len=LENGTH,
        batch_size=SETTINGS["batch_size"],
        val_fraction=0,
        seed=SETTINGS["seed"],
        cache_dir=str(folder.parent / "cache"),
    )
    started = bool(find_checkpoints(folder / "checkpoints"))
    options = {"max_steps": SETTINGS["steps"], "accelerator": "cpu", "enable_progress_bar": False}
    checkpoints = Checkpoints(every_n_steps=SETTINGS["steps"] // 2)
    fit(module, data, folder, checkpoints=checkpoints, resume="last" if started else None, **options)


if __name__ == "__main__":
    sys.exit(main())
