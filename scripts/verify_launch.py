"""One launch entry against float64 on this machine's GPU:
`python scripts/verify_launch.py chunk_gradients_kernel 128 64 4 2`.

The pass of the kernel is run with the entry (block, warps, stages) for heads of 128 channels, and of some less, in
bfloat16 and float16 under every decay and update that runs it, against its twin in PyTorch in float64; each twice,
which must give the same bits; in bfloat16 also at the size of a model, where the GPU is full. What Triton made of it
must not load over an operand that is in use (`pipelines.py`), which goes well most of the time. Prints a line per
case, and exits with 1 if one is wrong. An entry may reach outside its memory, after which a process is of no use:
`tune_launch.py` has one for each.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
from compare import relative_error
from pipelines import refilled_early
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
DECAY_GRADIENT = ("chunk_gradients", "delta_transform_backward", "chunk_scores_backward")  # have it if it is wanted
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 4e-3}  # rounding alone is a third of it
LENGTH, MODEL = 333, {"T": 2048, "B": 2, "H": 16, "HV": 16}


def variants(key: str) -> Iterator[tuple[str, bool]]:
    """The decays and updates that take the entry under `key`."""
    kernel, *kinds = key.split(", ")
    for decay in ("none", "scalar", "channel"):
        for delta in (False, True):
            if kernel in ("key_scores_kernel", "delta_apply_kernel", "delta_transform_backward_kernel") and not delta:
                continue
            if kernel == "key_scores_kernel" and decay == "channel":
                continue
            if kernel.startswith("channel_scores") and decay != "channel":
                continue
            if (kernel + ", per channel", "large") in TABLE and (decay == "channel") != ("per channel" in kinds):
                continue
            if (kernel + ", additive", "large") in TABLE and delta == ("additive" in kinds):
                continue
            yield decay, delta


def uneven(size: int) -> dict[str, int]:
    """Less than `size` channels."""
    return {"K": size - 24, "V": size - 40}


def use(key: str, size: int, entry: Launch) -> None:
    """From here on, heads of `size` channels take this entry."""
    name = device_class(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
    TABLE[key, name] = (TABLE.get((key, name)) or TABLE[key, "large"]) | {size: entry}


def check(name: str, decay: str, delta: bool, dtype: torch.dtype, **options: int) -> tuple[float, bool]:
    """The largest relative error of what the pass returns and writes, and whether it does so twice."""
    twins = Twins(decay, delta, dtype=dtype, **options)
    twins.advance_to(name)
    expected, actual, again = twins.expected(name), twins.found(name), twins.found(name)
    found = {key: x for key, x in actual.items() if x is not None}
    errors = [relative_error(x, expected[key]) for key, x in found.items()]
    same = all(torch.equal(x, again[key]) for key, x in found.items())
    return max(float("inf") if error != error else error for error in errors), same


def loaded_over(name: str) -> set[str]:
    """Operands that the compiled forms of a kernel load over while they are in use."""
    modules = [module for path, module in sys.modules.items() if ".triton_passes." in path]
    kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
    return {operand for compiled, _ in kernel.compiled.values() for operand in refilled_early(compiled.asm["ttgir"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("key", help="of TABLE")
    parser.add_argument("size", type=int, choices=(64, 128, 256))
    parser.add_argument("entry", type=int, nargs=3, metavar=("block", "warps", "stages"))
    arguments = parser.parse_args()
    name, size = PASSES[arguments.key.partition(", ")[0]], arguments.size
    use(arguments.key, size, Launch(*arguments.entry))
    wrong = 0
    lengths = {"T": LENGTH, "H": 1, "HV": 2}
    cases = [(dtype, lengths | sizes) for dtype in TOLERANCES for sizes in ({"K": size, "V": size}, uneven(size))]
    cases.append((torch.bfloat16, MODEL | {"K": size, "V": size}))
    if name in DECAY_GRADIENT:
        cases += [(dtype, shape | {"decay_gradient": False}) for dtype, shape in cases]
    for (decay, delta), (dtype, shape) in itertools.product(variants(arguments.key), cases):
        if decay == "none" and "decay_gradient" in shape:
            continue
        error, same = check(name, decay, delta, dtype, **shape)
        right = error < TOLERANCES[dtype] and same
        wrong += not right
        case = f"{name} {decay} {'delta' if delta else 'additive'} {dtype} {shape}".replace("torch.", "")
        print(f"{'right' if right else 'WRONG'} {error:.1e}{'' if same else ', other bits'} {case}", flush=True)
    if operands := loaded_over(arguments.key.partition(", ")[0]):
        wrong += 1
        print(f"WRONG: loads over operands in use: {', '.join(sorted(operands))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
