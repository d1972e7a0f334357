"""`lm-zoo eval inspect MODEL --text FILE --out FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_zoo.commands.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text that it reads")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for inspect.json and the pictures")
    parser.add_argument(
        "--length", type=positive, metavar="N", help="tokens of a training text (default: what the model's run says)"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of the text, whose attention is drawn (default 96, or less)"
    )
    parser.add_argument("--layers", type=layers, metavar="A,B", help="whose attention is drawn (default: four)")


def layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of layers such as 0,3,7") from None


def run(arguments: argparse.Namespace) -> None:
    from lm_zoo.eval.inspect_model import inspect_model, left_out, training_length
    from lm_zoo.eval.loading import load_model, read_text
    from lm_zoo.eval.report import check_writable

    text = read_text(arguments.text)
    check_writable(arguments.out / "inspect.json" if arguments.out.is_dir() else arguments.out)
    model, tokenizer = load_model(arguments.model)
    length = arguments.length or training_length(arguments.model, model)
    options = {"length": length, "tokens": arguments.tokens, "layers": arguments.layers}
    content = inspect_model(model, tokenizer, text, arguments.out, **options)
    for row in content["layers"]:
        memory = "" if "memory_length" not in row else f"   remembers {row['memory_length'] or float('inf'):9.1f}"
        print(f"layer {row['layer']:2d}  {row['mixer']:<22} looks back {row['attention_distance']:6.1f}{memory} tokens")
    for point in content["by_length"]:
        print(f"perplexity in {point['tokens']:>7,} tokens  {point['perplexity']:.4f}")
    if line := left_out(content):
        print(line)
    print(f"{arguments.out}: inspect.json, attention.png, memory.png, positions.png, lengths.png")
