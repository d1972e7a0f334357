"""The command `lm-zoo`: train, prepare data, linearize, evaluate, generate, list.

Exit codes: 0 for success, 2 for bad input (one line on stderr, nothing written), 130 after Ctrl-C. Each subcommand
imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from lm_zoo.commands import bench_decode, generate, harness, inspect, list_mixers, perplexity, serve, synthetic
from lm_zoo.commands.arguments import Parser
from lm_zoo.errors import is_user_error, one_line

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "bench decode": (bench_decode, "speed and memory over contexts and batches, beside the transformer's"),
    "eval harness": (harness, "lm-eval's tasks, and task files of your own"),
    "eval inspect": (inspect, "what a model looks at, how long it remembers, what it makes of long texts"),
    "eval perplexity": (perplexity, "token perplexity and bits per byte on a text"),
    "eval synthetic": (synthetic, "train mixers on a task that is made of a seed, and test them"),
    "generate": (generate, "continue a prompt, token by token"),
    "list": (list_mixers, "the token mixers of the zoo"),
    "serve": (serve, "answer requests of the OpenAI protocol"),
}
# These bring parsers of their own, which take seconds to import.
ELSEWHERE = {
    "train": "train a model from a YAML recipe: --config FILE [--any.option value]",
    "data": "tokenise text at size, for training: lm-zoo data prepare",
    "linearize": "turn a pretrained transformer into a linear-attention model",
}
GROUPS = {"bench": "measure this machine", "eval": "measure a model"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:
            from lm_zoo.train.cli import run

            run(argv[1:])
        elif argv[:1] == ["linearize"]:
            from lm_zoo.train.linearize.cli import run

            _quiet_transformers()
            run(argv[1:])
        elif argv[:1] == ["data"]:
            from lm_zoo.train.data_cli import run

            run(argv[1:])
        else:
            arguments = build_parser().parse_args(argv)
            _quiet_transformers()
            arguments.command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader left (`| head`); what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"lm-zoo: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> Parser:
    parser = Parser(
        prog="lm-zoo", description="Linear-attention language models: train, linearize, evaluate, generate."
    )
    top = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in ELSEWHERE.items():
        top.add_parser(name, add_help=False, help=text)
    groups = {
        name: top.add_parser(name, help=text).add_subparsers(required=True, metavar="MEASURE")
        for name, text in GROUPS.items()
    }
    for name, (module, text) in COMMANDS.items():
        *group, last = name.split()
        command = (groups[group[0]] if group else top).add_parser(last, help=text)
        module.add_arguments(command)
        command.set_defaults(command=module.run)
    return parser


def _quiet_transformers() -> None:
    """Bad input is one line on stderr, so transformers' own log and progress bars have to be silent."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
