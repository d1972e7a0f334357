"""How fast the scans are on this machine, against what is there otherwise: `python -m lm_zoo.eval.bench_scans`.

Measured and printed as in `bench_ops`: a ratio above 1 means that the scan is faster than its rival. For the linear
scan the measure is a plain copy of the same bytes, which nothing can beat.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lm_zoo.eval.bench_ops import Row, measure_plans, print_table
from lm_zoo.kernels import linear_scan, selective_scan

LINEAR_T, LINEAR_D = 4096, 1024
T, D, N = 2048, 512, 16
# The backward pass of transformers' scan is quadratic in T: each token's gradient is a tensor of all tokens' size.
BACKWARD_T = 512

Run = Callable[[], object]


def linear_inputs(requires_grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, LINEAR_T, LINEAR_D)
    inputs = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return [x.requires_grad_(requires_grad) for x in inputs]


def linear(backward: bool) -> Run:
    inputs = linear_inputs(backward)
    if not backward:
        return lambda: linear_scan(*inputs)
    dh = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(linear_scan(*inputs)[0], inputs, dh)


def copy() -> Run:
    """Reads two tensors and writes a third, as the scan must."""
    x, decay = linear_inputs(False)
    out = torch.empty_like(x)
    return lambda: torch.add(x, decay, out=out)


def transformers_linear() -> Run:
    """RecurrentGemma's loop over time."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    inputs = linear_inputs(False)
    reset = torch.zeros(1, LINEAR_T, 1, dtype=torch.bool)
    return lambda: RecurrentGemmaRglru._rnn_scan(None, *inputs, reset, None)


def selective_inputs(length: int, requires_grad: bool) -> list[Tensor]:
    """x, dt, A, B, C, D, z: A and the size of dt as Mamba is initialized."""
    generator = torch.Generator().manual_seed(0)
    x, dt, z = (torch.randn(1, length, D, generator=generator) for _ in range(3))
    B, C = (torch.randn(1, length, N, generator=generator) for _ in range(2))
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    return [tensor.requires_grad_(requires_grad) for tensor in (x, softplus(dt - 4), A, B, C, torch.ones(D), z)]


def selective(length: int, backward: bool) -> Run:
    inputs = selective_inputs(length, backward)
    if not backward:
        return lambda: selective_scan(*inputs)
    dy = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(selective_scan(*inputs)[0], inputs, dy)


def transformers_selective(length: int, backward: bool) -> Run:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    inputs = selective_inputs(length, backward)
    arguments = [x.transpose(1, 2) if x.dim() == 3 else x for x in inputs]
    dy = torch.ones(1, D, length)

    def run() -> object:
        y = mamba_selective_scan(*arguments)
        return torch.autograd.grad(y, inputs, dy) if backward else y

    return run


def measure(turns: int) -> list[Row]:
    plans = []
    for backward in (False, True):
        plans.append(("linear scan", backward, linear(backward), "a copy of the forward pass's bytes", copy()))
        if not backward:
            plans.append(("linear scan", False, linear(False), "transformers' RG-LRU loop", transformers_linear()))
        length = BACKWARD_T if backward else T
        ours, theirs = selective(length, backward), transformers_selective(length, backward)
        plans.append((f"selective scan, T {length}", backward, ours, "transformers' mamba_selective_scan", theirs))
    plans.append((f"selective scan, T {T}", True, selective(T, True), "its forward pass", selective(T, False)))
    return measure_plans(plans, turns)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_scans", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="how often each pair is timed in turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = measure(arguments.turns)
    print_table(rows, f"linear scan: T {LINEAR_T}  D {LINEAR_D}; selective scan: D {D}  N {N}; B 1")
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "scans": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
