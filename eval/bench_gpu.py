"""How fast the Triton kernels are on this GPU: `python -m lm_zoo.eval.bench_gpu --json docs/gpu/NAME.json`.

Every op at the shapes that the field's reference kernels publish, and over lengths at a constant number of tokens;
forward alone and with the backward pass; against flash-linear-attention where it is installed, against causal flash
attention (SDPA), and against what the device can move and multiply, measured in the same run. Rivals are timed in turn;
times are medians. A ratio above 1 means that the op is faster than its rival. `plot_gpu.py` draws the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention, softplus
from triton.testing import do_bench

from lm_zoo.eval.report import write_json
from lm_zoo.kernels import linear_attention, selective_scan

# B, T, H, D
SHAPES = [
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 1024, 8, 64),
    (8, 2048, 32, 256),
]
TOKENS, LENGTHS, SWEEP_H, SWEEP_D = 2**17, [2**n for n in range(11, 18)], 16, 128
SSM_STATE = 16
TURNS = 3

Run = Callable[[], object]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Row:
    op: str
    shape: Shape
    direction: str
    milliseconds: float
    mebibytes: float  # the most that a call added to what was held before it
    rival: str | None
    rival_milliseconds: float | None
    rival_mebibytes: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.rival_milliseconds is None else self.rival_milliseconds / self.milliseconds


# ---- the ops and their rivals -------------------------------------------------------------------------------------


def draw(shape: Shape) -> dict[str, Tensor]:
    """bfloat16 inputs with gates as trained models have them, and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda").to(dtype)

    B, T, H, D = shape
    inputs = {
        "q": normal(B, T, H, D),
        "k": normalize(normal(B, T, H, D), dim=-1),
        "v": normal(B, T, H, D),
        "channel": logsigmoid(normal(B, T, H, D, dtype=torch.float32)) / 16,
        "token": logsigmoid(normal(B, T, H, dtype=torch.float32)) / 16,
        "beta": normal(B, T, H).sigmoid(),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()} | {"do": normal(B, T, H, D)}


def retention_decay(heads: int) -> Tensor:
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device="cuda", dtype=torch.float32))))


def ours(op: str, x: dict[str, Tensor]) -> Run:
    q, k, v = x["q"], x["k"], x["v"]
    if op == "selective scan":
        return lambda: selective_scan(**x["ssm"])[0]
    gates = {
        "retention": (retention_decay(q.shape[2]), None),
        "GLA": (x["channel"], None),
        "gated DeltaNet": (x["token"], x["beta"]),
        "KDA": (x["channel"], x["beta"]),
        "Mamba-2": (x["token"], None),
    }[op]
    return lambda: linear_attention(q, k, v, *gates, backend="triton")[0]


def flash_linear_attention(op: str, x: dict[str, Tensor]) -> Run | None:
    if op == "selective scan" or importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = x["q"], x["k"], x["v"]
    return {
        "retention": lambda: chunk_retention(q, k, v)[0],
        "GLA": lambda: chunk_gla(q, k, v, x["channel"])[0],
        "gated DeltaNet": lambda: chunk_gated_delta_rule(q, k, v, x["token"], x["beta"])[0],
        "KDA": lambda: chunk_kda(q, k, v, x["channel"], x["beta"])[0],
        "Mamba-2": lambda: chunk_simple_gla(q, k, v, x["token"])[0],
    }[op]


def flash_attention(x: dict[str, Tensor]) -> Run:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def selective_inputs(shape: Shape) -> dict[str, Tensor]:
    """The H D channels of the shape as those of a Mamba layer."""
    B, T, H, D = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda").bfloat16()

    inputs = {
        "x": normal(B, T, H * D),
        "dt": softplus(normal(B, T, H * D) - 4),
        "A": -torch.arange(1.0, SSM_STATE + 1, device="cuda").repeat(H * D, 1),
        "B": normal(B, T, SSM_STATE),
        "C": normal(B, T, SSM_STATE),
        "D": torch.ones(H * D, device="cuda"),
        "z": normal(B, T, H * D),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


OPS = ("retention", "GLA", "gated DeltaNet", "KDA", "Mamba-2", "selective scan")


# ---- measuring ----------------------------------------------------------------------------------------------------


def with_backward(forward: Run, leaves: list[Tensor], gradient: Tensor) -> Run:
    return lambda: torch.autograd.grad(forward(), leaves, gradient, allow_unused=True)


def mebibytes(run: Run) -> float:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(runs: list[Run | None]) -> list[float | None]:
    """Milliseconds of each, the median over turns of the medians that `do_bench` finds with a cold cache."""
    found = [[] for _ in runs]
    for _ in range(TURNS):
        for run, times in zip(runs, found, strict=True):
            if run is not None:
                times.append(do_bench(run, warmup=10, rep=40, return_mode="median"))
    return [median(times) if times else None for times in found]


def measure(shape: Shape, ops: tuple[str, ...]) -> list[Row]:
    inputs = draw(shape)
    rows = []
    for op in ops:
        x = inputs
        if op == "selective scan":
            x = inputs | {"ssm": selective_inputs(shape)}
        mine, theirs = ours(op, x), flash_linear_attention(op, x)
        leaves = [
            t for t in (x["ssm"] if op == "selective scan" else x).values() if isinstance(t, Tensor) and t.is_leaf
        ]
        leaves = [t for t in leaves if t.requires_grad]
        do = x["do"].flatten(2) if op == "selective scan" else x["do"]
        for direction in ("forward", "forward + backward"):
            runs = [mine, theirs]
            if direction != "forward":
                runs = [None if run is None else with_backward(run, leaves, do) for run in runs]
            times = compare(runs)
            memory = [None if run is None else mebibytes(run) for run in runs]
            rival = None if theirs is None else "flash-linear-attention"
            rows.append(Row(op, shape, direction, times[0], memory[0], rival, times[1], memory[1]))
    attention = flash_attention(inputs)
    for direction in ("forward", "forward + backward"):
        leaves = [inputs[name] for name in "qkv"]
        run = attention if direction == "forward" else with_backward(attention, leaves, inputs["do"])
        rows.append(Row("flash attention", shape, direction, compare([run])[0], mebibytes(run), None, None, None))
    return rows


def ceilings() -> dict[str, float]:
    """What the device moves and multiplies at most: bytes of a copy, bfloat16 products of square matrices."""
    x = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = compare([lambda: y.copy_(x), lambda: a @ b])
    return {"copy_gb_per_s": 2 * x.numel() / copy / 1e6, "matmul_tflop_per_s": 2 * 8192**3 / product / 1e9}


def first_calls() -> dict[str, float]:
    """Seconds of the first forward and backward pass of each op in a new process, with nothing compiled before."""
    found = {}
    for op in OPS:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            command = [sys.executable, "-m", "lm_zoo.eval.bench_gpu", "--first-call", op]
            printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[op] = float(printed.split()[-1])
    print("first call, seconds:", {op: round(seconds, 2) for op, seconds in found.items()})
    return found


def first_call(op: str) -> float:
    shape = (1, 512, 4, 128)
    x = draw(shape) | {"ssm": selective_inputs(shape)}
    run = ours(op, x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run().float().sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- printing -----------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def print_rows(rows: list[Row]) -> None:
    names = ("op", "B x T x H x D", "direction", "ms", "rival ms", "ratio", "MiB", "rival")
    print("{:16} {:>20} {:>18} {:>9} {:>9} {:>6} {:>8} {:>8}".format(*names))
    for row in rows:
        shape = "x".join(map(str, row.shape))
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        theirs = "" if row.ratio is None else f"{row.rival_milliseconds:.3f}"
        memory = "" if row.ratio is None else f"{row.rival_mebibytes:.0f}"
        print(
            f"{row.op:16} {shape:>20} {row.direction:>18} {row.milliseconds:9.3f} {theirs:>9} {ratio:>6} "
            f"{row.mebibytes:8.0f} {memory:>8}"
        )
    ratios = [row.ratio for row in rows if row.ratio is not None]
    if ratios:
        print(f"geometric mean of {len(ratios)} ratios: {geometric_mean(ratios):.2f}, least: {min(ratios):.2f}")


def measure_all(shapes: list[Shape], ops: tuple[str, ...]) -> list[dict]:
    rows = [row for shape in shapes for row in measure(shape, ops)]
    print_rows(rows)
    return [asdict(row) for row in rows]


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "triton": triton.__version__}
    if importlib.util.find_spec("fla") is not None:
        found["flash-linear-attention"] = importlib.metadata.version("flash-linear-attention")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="which ones; all by default")
    parser.add_argument("--first-call", choices=OPS, help="only print the seconds that its first call takes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use here")
    if arguments.first_call:
        print(first_call(arguments.first_call))
        return
    found = {"device": torch.cuda.get_device_name(), "versions": versions(), "ceilings": ceilings()}
    print(found["device"], {name: round(value) for name, value in found["ceilings"].items()}, flush=True)
    sweep = [(TOKENS // length, length, SWEEP_H, SWEEP_D) for length in LENGTHS]
    parts = {
        "shapes": lambda: measure_all(SHAPES, tuple(arguments.ops)),
        "first_call_s": first_calls,
        "lengths": lambda: measure_all(sweep, tuple(arguments.ops)),
    }
    for part, measured in parts.items():
        found[part] = measured()
        if arguments.json:  # after each part: a lease may end before the last
            write_json(arguments.json, found)


if __name__ == "__main__":
    main()
