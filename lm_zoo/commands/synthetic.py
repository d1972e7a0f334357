"""`lm-zoo eval synthetic --task T`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_zoo.commands.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="T", help="a task, such as parity or mqar")
    parser.add_argument(
        "--mixers",
        metavar="A,B,C",
        help="mixers, or the task's variants of them, with options: gla,deltanet:num_heads=2 (default: the budget's)",
    )
    parser.add_argument("--budget", default="cpu", metavar="B", help="cpu, gpu or paper (default cpu)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default runs/synthetic/TASK-BUDGET)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs side by side (default: the budget's)")


def run(arguments: argparse.Namespace) -> None:
    from lm_zoo.eval.synthetic.plan import read_plan
    from lm_zoo.eval.synthetic.report import Progress, write_report

    mixers = None if arguments.mixers is None else arguments.mixers.split(",")
    plan = read_plan(arguments.task, arguments.budget, mixers, jobs=arguments.jobs)
    folder = arguments.output or Path("runs") / "synthetic" / f"{plan.name}-{plan.budget_name}"

    from lm_zoo.eval.synthetic.sweep import sweep

    progress = Progress()
    results = sweep(plan, folder / "runs", progress)
    print(write_report(plan, results, folder, minutes=progress.minutes))
