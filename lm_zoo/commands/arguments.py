"""What the subcommands' parsers share: a parser whose errors are one line, and kinds of numbers."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lm_zoo.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _number(text: str, kind: type, low: float, high: float, expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:  # NaN compares false and is refused too
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def positive(text: str) -> int:
    return _number(text, int, 1, 2**31 - 1, "a whole number of at least 1")


def port(text: str) -> int:
    return _number(text, int, 0, 2**16 - 1, "a port: a whole number from 0 to 65535")


def seed(text: str) -> int:
    return _number(text, int, 0, 2**63 - 1, "a whole number from 0 up")


def non_negative(text: str) -> float:
    return _number(text, float, 0, 1e6, "a number of at least 0")


def probability(text: str) -> float:
    value = _number(text, float, 0, 1, "a probability above 0 and at most 1")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability above 0 and at most 1")
    return value
