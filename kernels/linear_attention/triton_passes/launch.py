"""Launch parameters of the kernels: one small table instead of autotuning, so that the first call is quick, every run
is the same, and a sequence's result does not depend on what else is in the batch.

Keys are the kernel, the class of the device and the size of a head, rounded up to 64, 128 or 256. A class is what the
device has of shared memory per block: "large" (160 kB and more: A100) or "small" (99 kB consumer cards, and 64 kB on
AMD); "hopper" is large, too, with entries timed on an H200 (H100, H200), and takes those of "large" where it has none.
`scripts/tune_launch.py` finds entries on a GPU.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LARGE_SHARED_MEMORY = 160 * 1024


class Launch(NamedTuple):
    block: int  # channels of V, or of K, that a program takes
    warps: int
    stages: int


TABLE: dict[tuple[str, str], dict[int, Launch]] = {}


@cache
def device_class(device: torch.device) -> str:
    if device.type != "cuda":
        return "large"  # the interpreter, where it does not matter
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < LARGE_SHARED_MEMORY:
        return "small"
    return "hopper" if properties.major == 9 and torch.version.hip is None else "large"


def launch(kernel: str, x: Tensor, size: int) -> Launch:
    """For `kernel` on tensors like x whose heads have up to `size` channels. float32 needs twice the room, and takes
    the entry of the small class with half the channels per program, at least 16."""
    wide = x.dtype == torch.float32
    name = "small" if wide else device_class(x.device)
    entries = TABLE.get((kernel, name)) or TABLE[kernel, "large"]
    entry = entries[next(bucket for bucket in sorted(entries) if size <= bucket)]
    return entry._replace(block=max(16, entry.block // 2)) if wide else entry
