"""`lm-zoo bench decode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_zoo.commands.arguments import non_negative, positive

CONTEXTS = (128, 2048, 32768, 131072)
BATCHES = (1, 8, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixers", nargs="+", metavar="NAME", help="which ones (default: all, and the transformer)")
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS, metavar="N", help="tokens before")
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, metavar="B", help="texts at a time")
    parser.add_argument("--turns", type=positive, default=15, metavar="N", help="how often each is timed (15)")
    parser.add_argument("--compile", action="store_true", help="measure compiled steps too; needs a C++ compiler")
    parser.add_argument(
        "--seconds", type=non_negative, default=10, metavar="S", help="skip contexts that take longer to read (10)"
    )
    parser.add_argument(
        "--gigabytes", type=non_negative, metavar="G", help="skip larger states (default: 3/4 of the free memory)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers there")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw them there, .png or .svg")


def run(arguments: argparse.Namespace) -> None:
    from lm_zoo.config import suggest
    from lm_zoo.errors import UserError
    from lm_zoo.eval.bench_decode import Limits, against_transformers, bench_decode, free_memory, tables
    from lm_zoo.eval.decode_picture import draw_decoding
    from lm_zoo.eval.report import check_writable, write_json
    from lm_zoo.layers import MIXERS

    mixers = arguments.mixers or list(MIXERS)
    for name in mixers:
        if name not in MIXERS:
            raise UserError(f"--mixers has {name!r}, which is no mixer of lm_zoo{suggest(name, MIXERS)}")
    for path in (arguments.json, arguments.plot):
        if path is not None:
            check_writable(path)
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot must end in .png or .svg, got {arguments.plot}")
    size = 0.75 * free_memory() if arguments.gigabytes is None else arguments.gigabytes * 2**30
    limits = Limits(bytes=int(size), seconds=arguments.seconds)
    options = {"turns": arguments.turns, "limits": limits, "say": lambda text: print(text, flush=True)}
    report = bench_decode(mixers, arguments.contexts, arguments.batches, compile=arguments.compile, **options)
    if "mamba2" in mixers:
        report["mamba2_of_transformers"] = found = against_transformers(arguments.turns)
        for name in ("decode", "prefill"):
            print(f"Mamba-2, {name}: {found[name]['ratio']:.2f} times the speed of transformers' own")
    print("\n".join(tables(report)))
    for point in report["skipped"]:
        place = f"{point['what']}, {point['mixer']}, batch {point['batch']}, context {point['context']:,}"
        print(f"skipped: {place}: {point['reason']}")
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.plot is not None:
        draw_decoding(report, arguments.plot)
