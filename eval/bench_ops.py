"""How fast the ops are on this machine, against what is there otherwise: `python -m lm_zoo.eval.bench_ops`.

Speeds on a shared machine drift, so rivals are timed in turn, a block of runs each, and what is printed is the median
time and the median of the ratios within each turn. A ratio above 1 means that the op is faster than its rival.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from lm_zoo.kernels import linear_attention

B, T, H, K, CHUNK = 1, 2048, 8, 64, 64
DECAY_SHAPES = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}


@dataclass
class Row:
    name: str
    direction: str
    milliseconds: float
    rival: str
    rival_milliseconds: float
    ratio: float  # of the rival's time to the op's, median over the turns
    ratio_range: tuple[float, float]


def make_inputs(decay: str, delta: bool, requires_grad: bool) -> dict[str, Tensor | None]:
    """Decays of up to 0.1 nats per token: what trained gates do."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K, generator=generator) for _ in range(3))
    shape = DECAY_SHAPES[decay]
    inputs = {
        "q": q,
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": v,
        "log_decay": None if shape is None else -0.1 * torch.rand(shape, generator=generator),
        "beta": torch.rand(B, T, H, generator=generator) if delta else None,
    }
    return {name: None if x is None else x.requires_grad_(requires_grad) for name, x in inputs.items()}


def ours(decay: str, delta: bool, backward: bool) -> Callable[[], object]:
    inputs = make_inputs(decay, delta, requires_grad=backward)
    if not backward:
        return lambda: linear_attention(**inputs)
    do = torch.ones(B, T, H, K)
    leaves = [x for x in inputs.values() if x is not None]
    return lambda: torch.autograd.grad(linear_attention(**inputs)[0], leaves, do)


def transformers_gated_delta(backward: bool) -> Callable[[], object]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    leaves = [x for x in make_inputs("scalar", True, requires_grad=backward).values()]
    if not backward:
        return lambda: torch_chunk_gated_delta_rule(*leaves)
    do = torch.ones(B, T, H, K)
    return lambda: torch.autograd.grad(torch_chunk_gated_delta_rule(*leaves)[0], leaves, do)


def sdpa(backward: bool) -> Callable[[], object]:
    inputs = make_inputs("none", False, requires_grad=backward)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    do = torch.ones(B, H, T, K)
    return (lambda: torch.autograd.grad(attend(), [q, k, v], do)) if backward else attend


def matmuls(products: int) -> Callable[[], object]:
    """As many products of a chunk's `[64, 64]` tiles over all chunks and heads, the machine's rate for this size."""
    a, b = (torch.randn(B * H * T // CHUNK, CHUNK, CHUNK) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.bmm(a, b, out=out)

    return multiply


def compare(op: Callable[[], object], rival: Callable[[], object], turns: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each in every turn; a turn of the op is at least 50 ms, the rival follows at once."""

    def timer(function: Callable[[], object]) -> Timer:
        return Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())

    runs, times = [], ([], [])
    for function in (op, rival):
        runs.append(max(1, int(0.05 / timer(function).timeit(2).mean)))
    for _ in range(turns):
        for function, count, found in zip((op, rival), runs, times, strict=True):
            found.append(timer(function).timeit(count).mean * 1e3)
    return times


def measure(turns: int) -> list[Row]:
    plans = []
    for backward in (False, True):
        # The chunkwise form has 4 products of tiles per chunk forward; it is compared by its rate in them.
        if not backward:
            plans.append(("scalar decay", backward, ours("scalar", False, False), "4 products of tiles", matmuls(4)))
        plans += [
            ("no decay", backward, ours("none", False, backward), "causal attention (SDPA)", sdpa(backward)),
            ("decay per channel", backward, ours("channel", False, backward), "scalar decay",
             ours("scalar", False, backward)),
            ("gated delta rule", backward, ours("scalar", True, backward), "transformers' chunk form",
             transformers_gated_delta(backward)),
            ("delta rule, decay per channel", backward, ours("channel", True, backward), "gated delta rule",
             ours("scalar", True, backward)),
        ]  # fmt: skip
    rows = []
    for name, backward, op, rival_name, rival in plans:
        times, rival_times = compare(op, rival, turns)
        ratios = [theirs / mine for mine, theirs in zip(times, rival_times, strict=True)]
        direction = "forward + backward" if backward else "forward"
        spread = (min(ratios), max(ratios))
        rows.append(Row(name, direction, median(times), rival_name, median(rival_times), median(ratios), spread))
    return rows


def print_table(rows: list[Row]) -> None:
    title = f"B {B}  H {H}  T {T}  K = V = {K}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table("op", "direction", "ms", "against", "ms", "times as fast", "range", title=title)
    for row in rows:
        low, high = row.ratio_range
        numbers = (f"{row.milliseconds:.2f}", row.rival, f"{row.rival_milliseconds:.2f}", f"{row.ratio:.2f}")
        table.add_row(row.name, row.direction, *numbers, f"{low:.2f} - {high:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_ops", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="how often each pair is timed in turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = measure(arguments.turns)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
