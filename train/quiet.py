"""Tips, and warnings about what is on purpose here, kept off the screen. Everything else is shown."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

ON_PURPOSE = (
    r"The '\w+_dataloader' does not have many workers",  # rows are memory-mapped: reading them takes no time
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    # Lightning's command line uses what jsonargparse is about to drop; a later Lightning will not.
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"\s*(`+(ArgumentParser\.)?(add_instantiator|instantiate_classes)`+|skip_none parameter) was deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between torch and Lightning
    r"The number of training batches .* is smaller than the logging interval",  # the last step is always logged
)


# Levels for others' loggers: what they report as an error reaches the person as the one line of a UserError.
LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "huggingface_hub": logging.ERROR,
    "transformers": logging.ERROR,
    "datasets": logging.CRITICAL,
    "torch.distributed.tensor._redistribute": logging.ERROR,  # that gathering a whole matrix takes two messages
}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LEVELS}
    with warnings.catch_warnings():
        for message in ON_PURPOSE:
            warnings.filterwarnings("ignore", message=message)
        for name, level in LEVELS.items():
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
