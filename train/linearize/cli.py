"""`lm-zoo linearize TEACHER --output OUT --preset lolcats --text FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from lm_zoo.commands.arguments import Parser
from lm_zoo.errors import UserError
from lm_zoo.train.checkpoints import Interrupted
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.linearize.estimate import estimate
from lm_zoo.train.linearize.report import summary
from lm_zoo.train.linearize.run import MODES, linearize
from lm_zoo.train.linearize.sampling import SELF
from lm_zoo.train.linearize.sizes import parse_size
from lm_zoo.train.linearize.spec import LinearizeSpec, presets
from lm_zoo.train.linearize.stream_plan import estimate_stream
from lm_zoo.train.tokenizers import END_OF_TEXT

OF_A_STAGE = {"lr": "learning_rate", "tokens": "tokens", "epochs": "max_epochs", "batch": "batch", "length": "length"}


def run(argv: list[str]) -> None:
    """Linearizes as the arguments say. UserError for bad ones; exits with 130 or 143 after Ctrl-C or SIGTERM."""
    arguments = build_parser().parse_args(argv)
    spec = LinearizeSpec.load(arguments.preset).override(_overrides(arguments))
    if arguments.dry_run:
        if arguments.mode == "stream":
            lines = estimate_stream(arguments.teacher, spec, arguments.tflops, _max_memory(arguments))
        else:
            lines = estimate(arguments.teacher, spec, arguments.tflops)
        print("\n".join(lines))
        return
    if arguments.output is None:
        raise UserError("no --output: name a folder to write, which does not exist yet")
    try:
        _, report = linearize(
            arguments.teacher,
            spec,
            data=_text(arguments),
            output=arguments.output,
            prompt=arguments.prompt,
            resume=arguments.resume,
            mode=arguments.mode,
            max_memory=_max_memory(arguments),
        )
    except Interrupted as interrupted:
        print("stopped; the same command with --resume continues", file=sys.stderr)
        sys.exit(128 + interrupted.signum)
    print("\n".join([*summary(report), f"the student and its report are in {arguments.output}"]))


def build_parser() -> Parser:
    parser = Parser(
        prog="lm-zoo linearize",
        description="Turns a pretrained transformer into a linear-attention model in a Hugging Face folder.",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or Hugging Face name of a causal language model")
    parser.add_argument("--output", type=Path, metavar="OUT", help="folder to write; it must not exist")
    known = ", ".join(presets())
    parser.add_argument("--preset", default="lolcats", metavar="NAME", help=f"{known}, or a YAML file")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="stream for a teacher larger than memory: one layer's weights at a time, hidden states on the disk",
    )
    parser.add_argument("--max-memory", metavar="SIZE", help="what mode stream may take at most, such as 8GiB")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run for the same output")
    parser.add_argument("--dry-run", action="store_true", help="estimate memory, disk and time, and do nothing")
    parser.add_argument("--tflops", type=float, metavar="N", help="speed to estimate with, by default measured here")
    parser.add_argument("--prompt", metavar="TEXT", help="what teacher and student continue in the report")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        default=[],
        help="text, JSON lines or parquet; or `self`: the teacher writes",
    )
    text.add_argument("--val-text", nargs="+", metavar="FILE", default=[], help="held-out text")
    text.add_argument("--val-fraction", type=float, metavar="F", help="part of the text that is held out instead")
    text.add_argument("--dataset", metavar="NAME", help="a dataset of `datasets` instead of files")
    text.add_argument("--config", metavar="NAME", help="its configuration")
    text.add_argument("--split", default="train", help="(default train)")
    text.add_argument("--text-column", default="text", metavar="NAME", help="(default text)")
    text.add_argument("--streaming", action="store_true", help="do not download all of it first")
    text.add_argument("--max-tokens", type=int, metavar="N", help="of a stream")
    text.add_argument("--separator", default=END_OF_TEXT, help=f"between documents of a text file ({END_OF_TEXT})")
    text.add_argument("--cache-dir", type=Path, metavar="DIR", default=TextOptions.cache_dir, help="for tokenised text")

    changes = parser.add_argument_group("changes to the preset")
    changes.add_argument("--mixer", metavar="NAME", help="what takes the place of softmax attention")
    changes.add_argument("--keep-layers", type=_layers, metavar="0,4,-1", help="layers that keep their attention")
    changes.add_argument("--window", type=int, metavar="N", help="tokens of the window of softmax, 0 for none")
    changes.add_argument("--feature-map", metavar="NAME", help="of the linear part")
    changes.add_argument("--seed", type=int, metavar="N")
    for stage in ("transfer", "recover"):
        changes.add_argument(f"--no-{stage}", action="store_true", help=f"leave out the stage {stage}")
        for short, name in OF_A_STAGE.items():
            kind = float if short in ("lr", "epochs") else int
            changes.add_argument(f"--{stage}-{short}", type=kind, metavar="N", help=f"{stage}.{name}")
    changes.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other, such as recover.kl=1 or seed=1"
    )
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by their names in the spec."""
    given: dict[str, Any] = {
        "mixer": arguments.mixer,
        "keep_layers": arguments.keep_layers,
        "options.window": arguments.window,
        "options.feature_map": arguments.feature_map,
        "val_fraction": arguments.val_fraction,
        "seed": arguments.seed,
    }
    for stage in ("transfer", "recover"):
        for short, name in OF_A_STAGE.items():
            given[f"{stage}.{name}"] = getattr(arguments, f"{stage}_{short}")
    given = {name: value for name, value in given.items() if value is not None}
    for entry in arguments.set:
        name, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"--set {entry}: expected KEY=VALUE, such as recover.kl=1")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {entry}: {value!r} is no value of YAML") from error
    for stage in ("transfer", "recover"):
        if getattr(arguments, f"no_{stage}"):
            given[stage] = None
    return given


def _text(arguments: argparse.Namespace) -> TextOptions:
    if not arguments.text and not arguments.dataset:
        raise UserError(f"no text: give --text FILE, --dataset NAME, or --text {SELF}")
    return TextOptions(
        files=tuple(arguments.text),
        dataset=arguments.dataset,
        config=arguments.config,
        split=arguments.split,
        text_column=arguments.text_column,
        streaming=arguments.streaming,
        separator=arguments.separator,
        max_tokens=arguments.max_tokens,
        val_files=tuple(arguments.val_text),
        cache_dir=arguments.cache_dir,
    )


def _max_memory(arguments: argparse.Namespace) -> int | None:
    return None if arguments.max_memory is None else parse_size(arguments.max_memory)


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,4,-1") from None
