"""Refusing a batch that cannot fit before the machine is brought to its knees by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lm_zoo.causal_lm import PREFILL_CHUNK, CausalLM
from lm_zoo.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
REMEDY = "give a smaller --batch-size, or cut long texts with --max-length"


def check_memory(model: PreTrainedModel, rows: int, length: int, wanted: int) -> None:
    """UserError if `rows` texts of `length` tokens, with logits at `wanted` of them, surely take more than is free.

    Counted is the least that any model holds at once: the inputs and outputs of one layer's projections, and logits.
    """
    config = model.config.get_text_config()
    size = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 2 * size
    if isinstance(model, CausalLM):
        length, logits = min(length, PREFILL_CHUNK), 0  # long texts are read in pieces, and so are logits
    else:
        logits = rows * wanted * config.vocab_size
    needed = model.dtype.itemsize * (rows * length * (4 * size + inner) + logits)
    available = free_memory(model.device)
    if available is not None and needed > available:
        raise UserError(
            f"a batch of {rows} texts of {length:,} tokens takes at least {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free: {REMEDY}"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, `None` where the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    limits = []
    with contextlib.suppress(OSError, KeyError):
        limits.append(_table(MEMINFO)["MemAvailable:"] * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):  # a container's limit; "max" is none
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        limits.append(limit - used + _table(CGROUP / "memory.stat")["inactive_file"])
    return min(limits, default=None)


def _table(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


@contextlib.contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """An allocation that fails becomes a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if type(error) is RuntimeError and "can't allocate memory" not in told and "not enough memory" not in told:
            raise
        raise UserError(f"the memory does not suffice for batches of {batch_size} texts: {REMEDY}") from error
