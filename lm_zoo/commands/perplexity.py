"""`lm-zoo eval perplexity MODEL --text FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_zoo.commands.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to measure on")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there as well")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens per window (default 2,048, or less)")
    parser.add_argument("--stride", type=positive, metavar="N", help="step of the window (default context / 2)")
    parser.add_argument(
        "--prefix-length",
        type=positive,
        default=0,
        metavar="N",
        help="tokens of each window that see all of each other",
    )


def run(arguments: argparse.Namespace) -> None:
    from lm_zoo.eval.loading import load_model, read_text
    from lm_zoo.eval.perplexity import perplexity
    from lm_zoo.eval.report import check_writable, write_json

    text = read_text(arguments.text)
    if arguments.json is not None:
        check_writable(arguments.json)
    model, tokenizer = load_model(arguments.model)
    result = perplexity(
        model,
        tokenizer,
        text,
        context=arguments.context,
        stride=arguments.stride,
        prefix_length=arguments.prefix_length,
    )
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,} counted, windows of {result.context:,} every {result.stride:,}")
    if arguments.json is not None:
        write_json(arguments.json, {"model": str(arguments.model), "text": str(arguments.text), **result.as_dict()})
