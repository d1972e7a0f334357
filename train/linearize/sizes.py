"""Amounts of memory and time as people write and read them."""

from __future__ import annotations

import re

from lm_zoo.errors import UserError

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(bytes_: float) -> str:
    for unit in ("TiB", "GiB", "MiB"):
        if bytes_ >= UNITS[unit]:
            return f"{bytes_ / UNITS[unit]:,.1f} {unit}"
    return f"{bytes_ / 2**20:,.1f} MiB"


def parse_size(text: str) -> int:
    """Bytes of an amount such as 8GiB, 900 MiB or 1.5GB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = match and (UNITS | DECIMAL).get(match[2])
    if not unit or not float(match[1]) > 0:
        raise UserError(f"{text!r} is no amount of memory; write it as 8GiB or 900MiB")
    return int(float(match[1]) * unit)


def duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
