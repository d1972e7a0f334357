"""How fast the ops are on this machine, against what is there otherwise: `python -m lm_zoo.eval.bench_ops`.

Speeds on a shared machine drift, so rivals are timed in turn, a block of runs each, and what is printed is the median
time and the median of the ratios within each turn. A ratio above 1 means that the op is faster than its rival.
"""

import argparse
import json
import multiprocessing
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from lm_zoo.kernels import linear_attention

B, T, H, K, CHUNK = 1, 2048, 8, 64, 64
SSD_STATE = 128
LENGTHS = (4096, 8192, 16384)


# Name of the op, whether the backward pass is included, the op, name of the rival, the rival.
Plan = tuple[str, bool, Callable[[], object], str, Callable[[], object]]


@dataclass
class Row:
    name: str
    direction: str
    milliseconds: float
    rival: str
    rival_milliseconds: float
    ratio: float  # of the rival's time to the op's, median over the turns
    ratio_range: tuple[float, float]


def make_inputs(decay: str, delta: bool, requires_grad: bool, length: int = T) -> dict[str, Tensor | None]:
    """Decays of up to 0.1 nats per token: what trained gates do."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, length, H, K, generator=generator) for _ in range(3))
    shape = {"none": None, "scalar": (B, length, H), "channel": (B, length, H, K)}[decay]
    inputs = {
        "q": q,
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": v,
        "log_decay": None if shape is None else -0.1 * torch.rand(shape, generator=generator),
        "beta": torch.rand(B, length, H, generator=generator) if delta else None,
    }
    return {name: None if x is None else x.requires_grad_(requires_grad) for name, x in inputs.items()}


def ours(decay: str, delta: bool, backward: bool, length: int = T) -> Callable[[], object]:
    inputs = make_inputs(decay, delta, requires_grad=backward, length=length)
    if not backward:
        return lambda: linear_attention(**inputs)
    do = torch.ones(B, length, H, K)
    leaves = [x for x in inputs.values() if x is not None]
    return lambda: torch.autograd.grad(linear_attention(**inputs)[0], leaves, do)


def transformers_gated_delta(backward: bool, substitution: bool = False) -> Callable[[], object]:
    """Its chunk form in eager mode; with `substitution`, the form that it takes for export, which inverts the triangle
    row by row instead of calling `solve_triangular`."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    leaves = list(make_inputs("scalar", True, requires_grad=backward).values())
    do = torch.ones(B, T, H, K)

    def run() -> object:
        with patch.object(modeling_qwen3_next, "is_torchdynamo_exporting", lambda: substitution):
            o = modeling_qwen3_next.torch_chunk_gated_delta_rule(*leaves)[0]
        return torch.autograd.grad(o, leaves, do) if backward else o

    return run


def transformers_kimi_delta(backward: bool) -> Callable[[], object]:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    leaves = list(make_inputs("channel", True, requires_grad=backward).values())
    do = torch.ones(B, T, H, K)

    def run() -> object:
        o = chunk_kimi_delta_attention(*leaves)[0]
        return torch.autograd.grad(o, leaves, do) if backward else o

    return run


def ssd_inputs(requires_grad: bool) -> list[Tensor]:
    """x, dt, A, B and C of Mamba-2, one group of B and C for all heads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, H, K, generator=generator)
    dt = 0.1 * torch.rand(B, T, H, generator=generator)
    b, c = (torch.randn(B, T, 1, SSD_STATE, generator=generator) for _ in range(2))
    return [t.requires_grad_(requires_grad) for t in (x, dt, -torch.arange(1.0, H + 1), b, c)]


def ssd(backward: bool) -> Callable[[], object]:
    inputs = x, dt, A, b, c = ssd_inputs(backward)

    def run() -> object:
        y = linear_attention(c, b, dt[..., None] * x, dt * A, scale=1.0)[0]
        return torch.autograd.grad(y, inputs, torch.ones_like(y)) if backward else y

    return run


def transformers_ssd(backward: bool) -> Callable[[], object]:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    inputs = ssd_inputs(backward)
    chunk = Mamba2Config().chunk_size

    def run() -> object:
        y = mamba2_chunk_scan(*inputs, chunk_size=chunk)
        return torch.autograd.grad(y, inputs, torch.ones_like(y)) if backward else y

    return run


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
            ("gated delta rule", backward, ours("scalar", True, backward), "transformers' form for export",
             transformers_gated_delta(backward, substitution=True)),
            ("delta rule, decay per channel", backward, ours("channel", True, backward), "gated delta rule",
             ours("scalar", True, backward)),
            ("delta rule, decay per channel", backward, ours("channel", True, backward), "transformers' Kimi form",
             transformers_kimi_delta(backward)),
            ("SSD, state 128", backward, ssd(backward), "transformers' mamba2_chunk_scan", transformers_ssd(backward)),
        ]  # fmt: skip
    return measure_plans(plans, turns)


def measure_plans(plans: list[Plan], turns: int) -> list[Row]:
    rows = []
    for name, backward, op, rival_name, rival in plans:
        times, rival_times = compare(op, rival, turns)
        ratios = [theirs / mine for mine, theirs in zip(times, rival_times, strict=True)]
        direction = "forward + backward" if backward else "forward"
        spread = (min(ratios), max(ratios))
        rows.append(Row(name, direction, median(times), rival_name, median(rival_times), median(ratios), spread))
    return rows


@dataclass
class Length:
    name: str
    tokens: int
    milliseconds: float
    mebibytes: float  # the most that the process grew by, inputs and gradients aside


def measure_lengths(turns: int) -> list[Length]:
    """Forward and backward over doubling lengths: time in turns, memory in a process of its own."""
    found = []
    for name, decay, delta in (("scalar decay", "scalar", False), ("gated delta rule", "scalar", True)):
        functions = [ours(decay, delta, True, length) for length in LENGTHS]
        times = [[] for _ in LENGTHS]
        for _ in range(turns):
            for function, milliseconds in zip(functions, times, strict=True):
                milliseconds.append(Timer("function()", globals={"function": function}).timeit(1).mean * 1e3)
        for length, milliseconds in zip(LENGTHS, times, strict=True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_memory, (decay, delta, length))
            found.append(Length(name, length, median(milliseconds), peak / 2**20))
    return found


def peak_memory(decay: str, delta: bool, length: int) -> int:
    """Bytes by which forward and backward raise this process's peak; for a process that has done nothing else."""
    ours(decay, delta, True, CHUNK)()  # what PyTorch sets up once
    function = ours(decay, delta, True, length)
    before = high_water()
    function()
    return high_water() - before


def high_water() -> int:
    """The most memory that this process has held, in bytes, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def print_lengths(lengths: list[Length]) -> None:
    table = Table("op, forward + backward", "T", "ms", "MiB", "time, times half", "memory, times half")
    for shorter, row in zip([None, *lengths[:-1]], lengths, strict=True):
        doubled = shorter is not None and shorter.name == row.name
        time = f"{row.milliseconds / shorter.milliseconds:.2f}" if doubled else ""
        memory = f"{row.mebibytes / shorter.mebibytes:.2f}" if doubled else ""
        table.add_row(row.name, str(row.tokens), f"{row.milliseconds:.1f}", f"{row.mebibytes:.0f}", time, memory)
    Console().print(table)


def print_table(rows: list[Row], sizes: str = f"B {B}  H {H}  T {T}  K = V = {K}") -> None:
    title = f"{sizes}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
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
    lengths = measure_lengths(arguments.turns)
    print_lengths(lengths)
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        found |= {"ops": [asdict(row) for row in rows], "lengths": [asdict(row) for row in lengths]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
