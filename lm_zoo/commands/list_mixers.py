"""`lm-zoo list`."""

from __future__ import annotations

import argparse

from lm_zoo.commands.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hidden-size", type=positive, default=512, metavar="D", help="size that is counted at (default 512)"
    )
    parser.add_argument("--markdown", action="store_true", help="the page docs/zoo.md, with equations and presets")


def run(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        from lm_zoo.eval.zoo_page import zoo_page

        print(zoo_page(arguments.hidden_size), end="")
        return
    from lm_zoo.eval.mixers import print_mixers

    print_mixers(arguments.hidden_size)
