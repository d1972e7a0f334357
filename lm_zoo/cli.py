"""The command `lm-zoo`: train, prepare data, linearize, evaluate, generate, list.

Exit codes: 0 for success, 2 for bad input (one line on stderr, nothing written), 130 after Ctrl-C. Each subcommand
imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lm_zoo.errors import UserError, is_user_error, one_line


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # its options are LightningCLI's own
            from lm_zoo.train.cli import run

            run(argv[1:])
        elif argv[:1] == ["linearize"]:  # its options are in train/linearize, which takes seconds to import
            from lm_zoo.train.linearize.cli import run

            _quiet_transformers()
            run(argv[1:])
        elif argv[:1] == ["data"]:  # its options are in train/data_cli
            from lm_zoo.train.data_cli import add_arguments
            from lm_zoo.train.data_cli import run as run_data

            run_data(_data_parser(add_arguments).parse_args(argv[1:]))
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    parser = Parser(
        prog="lm-zoo", description="Linear-attention language models: train, linearize, evaluate, generate."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "train", add_help=False, help="train a model from a YAML recipe: --config FILE [--any.option value]"
    )

    commands.add_parser("data", add_help=False, help="tokenise text at size, for training: lm-zoo data prepare")
    commands.add_parser("linearize", add_help=False, help="turn a pretrained transformer into a linear-attention model")

    evaluate = commands.add_parser("eval", help="measure a model")
    measures = evaluate.add_subparsers(required=True, metavar="MEASURE")
    perplexity = measures.add_parser("perplexity", help="token perplexity and bits per byte on a text")
    perplexity.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    perplexity.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to measure on")
    perplexity.add_argument("--json", type=Path, metavar="OUT", help="write the result there as well")
    perplexity.add_argument("--context", type=_positive, metavar="N", help="tokens per window (default 2,048, or less)")
    perplexity.add_argument("--stride", type=_positive, metavar="N", help="step of the window (default context / 2)")
    perplexity.set_defaults(command=_perplexity)

    generate = commands.add_parser("generate", help="continue a prompt, token by token")
    generate.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    generate.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="go on from where an earlier run stopped, and keep where this one does",
    )
    generate.add_argument(
        "--temperature", type=_non_negative, default=0.8, help="0: always the likeliest token (default 0.8)"
    )
    generate.add_argument("--top-p", type=_probability, default=0.95, help="nucleus sampling (default 0.95)")
    generate.add_argument("--seed", type=_seed, default=0, help="same seed, same text (default 0)")
    generate.add_argument("--max-tokens", type=_positive, default=200, metavar="N", help="(default 200)")
    generate.set_defaults(command=_generate)

    mixers = commands.add_parser("list", help="the token mixers of the zoo")
    mixers.add_argument(
        "--hidden-size", type=_positive, default=512, metavar="D", help="size that is counted at (default 512)"
    )
    mixers.add_argument("--markdown", action="store_true", help="the page docs/zoo.md, with equations and presets")
    mixers.set_defaults(command=_list)
    return parser


def _data_parser(add_arguments: Callable[[argparse.ArgumentParser], None]) -> Parser:
    parser = Parser(prog="lm-zoo data", description="Text at size.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    add_arguments(actions.add_parser("prepare", help="tokenise text into a folder that lm-zoo train reads"))
    return parser


def _perplexity(arguments: argparse.Namespace) -> None:
    from lm_zoo.eval.loading import load_model, read_text
    from lm_zoo.eval.perplexity import perplexity
    from lm_zoo.eval.report import check_writable, write_json

    text = read_text(arguments.text)
    if arguments.json is not None:
        check_writable(arguments.json)
    model, tokenizer = load_model(arguments.model)
    result = perplexity(model, tokenizer, text, context=arguments.context, stride=arguments.stride)
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,} counted, windows of {result.context:,} every {result.stride:,}")
    if arguments.json is not None:
        write_json(arguments.json, {"model": str(arguments.model), "text": str(arguments.text), **result.as_dict()})


def _generate(arguments: argparse.Namespace) -> None:
    from lm_zoo.eval.generation import generate
    from lm_zoo.eval.loading import decode_utf8, load_model

    prompt, state = arguments.prompt, arguments.state
    is_new = state is not None and not state.exists()
    if prompt is None and (state is None or is_new):
        raise UserError("give --prompt TEXT, or --state FILE of an earlier run; see `lm-zoo generate --help`")
    if prompt == "-":
        prompt = decode_utf8(sys.stdin.buffer.read(), "the prompt on standard input")
    model, tokenizer = load_model(arguments.model)
    generate(
        model,
        tokenizer,
        prompt or "",
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stream=sys.stdout,
        state=state,
    )
    if is_new:
        print(f"lm-zoo: {state} is new: the text began here", file=sys.stderr)


def _list(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        from lm_zoo.eval.zoo_page import zoo_page

        print(zoo_page(arguments.hidden_size), end="")
        return
    from lm_zoo.eval.mixers import print_mixers

    print_mixers(arguments.hidden_size)


def _quiet_transformers() -> None:
    """Bad input is one line on stderr, so transformers' own log and progress bars have to be silent."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _number(text: str, kind: type, low: float, high: float, expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:  # NaN compares false and is refused too
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _positive(text: str) -> int:
    return _number(text, int, 1, 2**31 - 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _number(text, int, 0, 2**63 - 1, "a whole number from 0 up")


def _non_negative(text: str) -> float:
    return _number(text, float, 0, 1e6, "a number of at least 0")


def _probability(text: str) -> float:
    value = _number(text, float, 0, 1, "a probability above 0 and at most 1")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
