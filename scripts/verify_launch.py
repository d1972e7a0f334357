"""One launch entry against float64 on this machine's GPU:
`python scripts/verify_launch.py chunk_gradients_kernel 128 64 4 2`.

The pass of the kernel is run with the entry (block, warps, stages) for heads of 128 channels, and of some less, in
bfloat16 and float16 under every decay and update that runs it, against its twin in PyTorch in float64; and twice at the
size of a model, which must give the same bits. Prints a line per case, and exits with 1 if one is wrong. An entry may
reach outside its memory, after which a process is of no use: `tune_launch.py` gives each one its own.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
from compare import relative_error
from triton_twins import DEVICE, Twins

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, device_class

PASSES = {  # that launch a kernel
    "key_scores_kernel": "chunk_scores",
    "channel_scores_kernel": "chunk_scores",
    "delta_apply_kernel": "delta_apply",
    "chunk_states_kernel": "chunk_states",
    "chunk_output_kernel": "chunk_output",
    "chunk_output_backward_kernel": "chunk_output_backward",
    "chunk_states_backward_kernel": "chunk_states_backward",
    "chunk_gradients_kernel": "chunk_gradients",
    "delta_transform_backward_kernel": "delta_transform_backward",
    "channel_scores_backward_kernel": "chunk_scores_backward",
}
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 4e-3}  # rounding alone is a third of it
LENGTH, MODEL = 333, {"T": 2048, "B": 2, "H": 16, "HV": 16}


def variants(key: str) -> Iterator[tuple[str, bool]]:
    """The decays and updates that take the entry under `key`."""
    kernel, _, per_channel = key.partition(", ")
    for decay in ("none", "scalar", "channel"):
        for delta in (False, True):
            if kernel in ("key_scores_kernel", "delta_apply_kernel", "delta_transform_backward_kernel") and not delta:
                continue
            if kernel == "key_scores_kernel" and decay == "channel":
                continue
            if kernel.startswith("channel_scores") and decay != "channel":
                continue
            if (kernel + ", per channel", "large") in TABLE and (decay == "channel") != bool(per_channel):
                continue
            yield decay, delta


def use(key: str, size: int, entry: Launch) -> None:
    """From here on, heads of `size` channels take this entry."""
    name = device_class(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
    TABLE[key, name] = (TABLE.get((key, name)) or TABLE[key, "large"]) | {size: entry}


def check(name: str, decay: str, delta: bool, dtype: torch.dtype, **shape: int) -> float:
    """The largest relative error of what the pass returns and writes."""
    twins = Twins(decay, delta, dtype=dtype, **shape)
    twins.advance_to(name)
    expected, actual = twins.expected(name), twins.found(name)
    errors = [relative_error(x, expected[key]) for key, x in actual.items() if x is not None]
    return max(float("inf") if error != error else error for error in errors)


def same_bits(name: str, decay: str, delta: bool, dtype: torch.dtype, **shape: int) -> bool:
    twins = Twins(decay, delta, dtype=dtype, **shape)
    twins.advance_to(name)
    first, second = twins.found(name), twins.found(name)
    return all(x is None or torch.equal(x, second[key]) for key, x in first.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("key", help="of TABLE")
    parser.add_argument("size", type=int, choices=(64, 128, 256))
    parser.add_argument("entry", type=int, nargs=3, metavar=("block", "warps", "stages"))
    arguments = parser.parse_args()
    name, size = PASSES[arguments.key.partition(", ")[0]], arguments.size
    use(arguments.key, size, Launch(*arguments.entry))
    wrong = 0
    for decay, delta in variants(arguments.key):
        for dtype, tolerance in TOLERANCES.items():
            for K, V in ((size, size), (size - 24, size - 40)):
                error = check(name, decay, delta, dtype, T=LENGTH, H=1, HV=2, K=K, V=V)
                wrong += not error < tolerance
                case = f"{name} {decay} {'delta' if delta else 'additive'} {dtype} K={K} V={V}".replace("torch.", "")
                print(f"{'right' if error < tolerance else 'WRONG'} {error:.1e} {case}", flush=True)
        if not same_bits(name, decay, delta, torch.bfloat16, K=size, V=size, **MODEL):
            wrong += 1
            print(f"WRONG: other bits the second time, {name} {decay} {'delta' if delta else 'additive'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
