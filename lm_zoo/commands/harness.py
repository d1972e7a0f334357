"""`lm-zoo eval harness MODEL --tasks NAMES`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from lm_zoo.commands.arguments import positive
from lm_zoo.commands.arguments import seed as whole_number
from lm_zoo.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="tasks or groups, with commas between them")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    parser.add_argument(
        "--num-fewshot", type=whole_number, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="texts at a time (default 16)")
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut longer texts on the left (default: refuse what the model cannot take)",
    )
    parser.add_argument("--read-twice", action="store_true", help="give the model every context twice")
    parser.add_argument(
        "--prefix", action="store_true", help="let the tokens of a context see each other, where layers can do that"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there as well")


def run(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('lm-eval is not installed; get it with: pip install "lm_zoo[eval]"')
    from lm_zoo.eval.harness.evaluation import harness
    from lm_zoo.eval.loading import load_model
    from lm_zoo.eval.report import check_writable, write_json

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task")
    if arguments.json is not None:
        check_writable(arguments.json)
    model, tokenizer = load_model(arguments.model)
    options = {
        "num_fewshot": arguments.num_fewshot,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "read_twice": arguments.read_twice,
        "prefix": arguments.prefix,
    }
    report = harness(model, tokenizer, names, include_path=arguments.include_path, progress=sys.stderr, **options)
    width = max(len(row.task) for row in report.measured)
    for row in report.measured:
        value = "not a number" if row.value is None else f"{row.value:.4f}"
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        count = "" if row.documents is None else f"   {row.documents:,} documents"
        print(f"{row.task:<{width}}  {row.metric}  {value}{error}{count}")
    print(f"{report.tokens_read:,} tokens read for {report.tokens:,} asked about, in {report.seconds:.1f} s")
    if report.texts_cut:
        print(f"{report.texts_cut:,} texts cut on the left to {arguments.max_length:,} tokens")
    if arguments.json is not None:
        write_json(arguments.json, {"model": str(arguments.model), "tasks": names, **options, **report.as_dict()})
