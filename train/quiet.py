"""Lightning's tips, and its warnings about what is on purpose here, kept off the screen. Everything else is shown."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

ON_PURPOSE = (
    r"The '\w+_dataloader' does not have many workers",  # rows are memory-mapped: reading them takes no time
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between torch and Lightning
    r"The variable name .* already exists",
)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in ON_PURPOSE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
