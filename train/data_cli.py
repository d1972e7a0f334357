"""`lm-zoo data prepare`: text into a folder of tokens, which `lm-zoo train --data.prepared FOLDER` reads."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lm_zoo.commands.arguments import Parser
from lm_zoo.errors import UserError
from lm_zoo.train.prepare import TOKENIZER, prepare
from lm_zoo.train.quiet import quiet_libraries
from lm_zoo.train.sources import Source, Table, file_source, find_files
from lm_zoo.train.tokenizers import SMALLEST_BPE, load_tokenizer
from lm_zoo.train.trained_tokenizer import text_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--files",
        nargs="+",
        metavar="FILE",
        help="text, JSON lines or parquet: paths, globs, URLs, @FILE with one each",
    )
    text.add_argument("--name", help="a dataset on the Hugging Face hub, or the folder of one")
    parser.add_argument("--config", help="configuration of --name, for example sample-10BT")
    parser.add_argument("--split", default="train", help="of --name (default train)")
    parser.add_argument("--text-column", default="text", help="of JSON lines, parquet and --name (default text)")
    parser.add_argument("--separator", help="what stands between documents of a text file; by default a file is one")
    parser.add_argument(
        "--streaming", action="store_true", help="read --name as it comes, without downloading it first"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after so many tokens")
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes (default), bpe (trained on the text), a folder or name"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="that bpe learns (default 4096)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tokens go")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(argv: list[str]) -> None:
    parser = Parser(prog="lm-zoo data", description="Text at size.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    add_arguments(actions.add_parser("prepare", help="tokenise text into a folder that lm-zoo train reads"))
    _prepare(parser.parse_args(argv))


def _prepare(arguments: argparse.Namespace) -> None:
    for name, low in (("max_tokens", 1), ("workers", 1), ("vocab_size", SMALLEST_BPE)):
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value} is not possible; give at least {low}")
    with quiet_libraries():
        source = _source(arguments)
        # Trained once: the work is resumed with the tokenizer that it was begun with.
        known = arguments.out / TOKENIZER
        if arguments.tokenizer == "bpe" and known.is_dir():
            tokenizer = load_tokenizer(known)
        else:
            tokenizer = text_tokenizer(arguments.tokenizer, source, arguments.vocab_size, arguments.out.parent)
        start = time.monotonic()
        options = {"workers": arguments.workers, "max_tokens": arguments.max_tokens}
        counts = prepare(source, tokenizer, arguments.out, **options)
    print(
        f"{counts.documents:,} documents, {counts.tokens:,} tokens of {counts.text_bytes:,} bytes in {arguments.out} "
        f"({time.monotonic() - start:,.0f} s)",
        file=sys.stderr,
    )


def _source(arguments: argparse.Namespace) -> Source:
    options = {
        "text_column": arguments.text_column,
        "streaming": arguments.streaming,
        "column_option": "--text-column",
    }
    if arguments.name is not None:
        return Table(arguments.name, config=arguments.config, split=arguments.split, **options)
    return file_source(find_files(arguments.files), separator=arguments.separator, **options)
