"""Compiles every Triton kernel that the ops can launch, without a GPU: `python scripts/compile_kernels.py`.

The public ops are called on small CPU tensors in every combination of flags, forward and backward; their launches are
compiled for each target instead of run. Printed per kernel, target and head size, worst of its flag combinations:
registers, bytes spilled, shared memory, and how many of its products of two tiles are on matrix units. The same goes to
a JSON file. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # compiled, whatever the caller tests with
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from pipelines import refilled_early
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lm_zoo import kernels as ops
from lm_zoo.kernels import backends
from lm_zoo.kernels.linear_attention.triton_passes import launch
from lm_zoo.kernels.triton_kernel import Kernel, take_newer_assembler

SIZES = (64, 128, 256)
# Name of the target, what Triton calls it, and the class of its launch parameters (`launch.py`).
TARGETS = {
    "cuda:80": (GPUTarget("cuda", 80, 32), "large"),  # A100
    "cuda:89": (GPUTarget("cuda", 89, 32), "small"),  # consumer cards
    "cuda:90": (GPUTarget("cuda", 90, 32), "hopper"),  # H100, H200
    "cuda:100": (GPUTarget("cuda", 100, 32), "large"),  # B200
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), "small"),  # MI300
}
SHARED_MEMORY = {
    "cuda:80": 163,
    "cuda:89": 99,
    "cuda:90": 227,
    "cuda:100": 227,
    "hip:gfx942": 64,
}  # kB a block may have
PRODUCT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
NO_SPILLS = ("cuda:80", "cuda:90")  # at heads of up to 128 channels


@dataclass
class Report:
    """One kernel at one head size on one target; the worst over its flag combinations."""

    kernel: str
    target: str
    size: int
    variants: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    products: int = 0  # of two tiles, in the variant that has most
    off_matrix_units: int = 0  # of them
    refilled_early: int = 0  # operands in shared memory that are loaded anew while a product may still read them
    matrix_instructions: str = ""

    def add(self, other: Report) -> None:
        self.variants += 1
        for field in fields(self):
            if field.type == "int" and field.name not in ("size", "variants"):
                setattr(self, field.name, max(getattr(self, field.name), getattr(other, field.name)))
        names = {*self.matrix_instructions.split(), *other.matrix_instructions.split()}
        self.matrix_instructions = " ".join(sorted(names))

    def missed(self) -> list[str]:
        limit = SHARED_MEMORY[self.target] * 1024
        found = []
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, {limit} fit")
        if self.target in NO_SPILLS and self.size <= 128 and self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        if self.off_matrix_units:
            found.append(f"{self.off_matrix_units} products not on matrix units")
        if self.refilled_early:
            found.append(f"{self.refilled_early} operands loaded anew under a product")
        return found


class NoDevice:
    """What Triton asks of a driver to compile for a target, with no device behind it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name][0]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


# ---- what the ops can launch --------------------------------------------------------------------------------------


def cases(size: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls of the public ops with heads of `size` channels that together launch every kernel in every flag
    combination."""
    yield from linear_attention_cases(size, dtype)
    yield from step_cases(size, dtype)
    yield from norm_cases(size, dtype)
    if size == min(SIZES):  # no heads here
        yield from scan_cases(dtype)
        yield from conv_cases(dtype)


def draw(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=grad)


def backward(outputs: tuple | torch.Tensor) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((x.abs() if x.is_complex() else x).float().sum() for x in outputs if x is not None).backward()


def linear_attention_cases(size: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    T, H, HV = 200, 1, 2
    decays = [(None, False), *itertools.product([(1, T, HV), (1, T, HV, size)], (True, False))]
    for (gates, learned), delta, packed in itertools.product(decays, (False, True), (False, True)):

        def call(gates=gates, learned=learned, delta=delta, packed=packed) -> None:
            cu_seqlens = torch.tensor([0, 70, T]) if packed else None
            backward(
                ops.linear_attention(
                    *(draw(1, T, H, size, dtype=dtype) for _ in range(2)),
                    draw(1, T, HV, size, dtype=dtype),
                    None if gates is None else draw(*gates, dtype=torch.float32, grad=learned),
                    draw(1, T, HV, dtype=dtype) if delta else None,
                    initial_state=draw(2 if packed else 1, HV, size, size, dtype=torch.float32),
                    output_final_state=True,
                    cu_seqlens=cu_seqlens,
                )
            )

        yield call


def step_cases(size: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    H, HV = 1, 2
    for decay, delta in itertools.product((None, (1, 3, HV), (1, 3, HV, size), (HV,)), (False, True)):

        def call(decay=decay, delta=delta) -> None:
            ops.linear_attention_step(
                *(draw(1, 3, H, size, dtype=dtype, grad=False) for _ in range(2)),
                draw(1, 3, HV, size, dtype=dtype, grad=False),
                None if decay is None else draw(*decay, dtype=torch.float32, grad=False),
                draw(1, 3, HV, dtype=dtype, grad=False) if delta else None,
                draw(1, HV, size, size, dtype=torch.float32, grad=False),
            )

        yield call


def norm_cases(size: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    for D in (size, 16 * size):
        for gated in (False, True):
            yield lambda D=D, gated=gated: backward(
                ops.rms_norm(
                    draw(2, 100, D, dtype=dtype),
                    draw(D, dtype=dtype),
                    draw(2, 100, D, dtype=dtype) if gated else None,
                    eps=1e-6,
                )
            )
    yield lambda: backward(ops.l2_norm(draw(2, 100, 2, size, dtype=dtype)))


def scan_cases(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    D = 96
    for length, packed in itertools.product((40, 3000), (False, True)):
        rows, cu_seqlens = (2, torch.tensor([0, 17, length])) if packed else (1, None)
        options = {"output_final_state": True, "cu_seqlens": cu_seqlens}
        for kind, reverse in itertools.product((dtype, torch.complex64), (False, True)):
            yield lambda length=length, rows=rows, kind=kind, reverse=reverse, options=options: backward(
                ops.linear_scan(
                    *(draw(1, length, D, dtype=kind) for _ in range(2)),
                    initial_state=draw(rows, D, dtype=torch.promote_types(kind, torch.float32)),
                    reverse=reverse,
                    **options,
                )
            )
        for N, gated in itertools.product((16, 64, 128), (False, True)):
            yield lambda length=length, rows=rows, N=N, gated=gated, options=options: backward(
                ops.selective_scan(
                    *(draw(1, length, D, dtype=dtype) for _ in range(2)),
                    draw(D, N, dtype=torch.float32),
                    *(draw(1, length, N, dtype=dtype) for _ in range(2)),
                    draw(D, dtype=torch.float32) if gated else None,
                    draw(1, length, D, dtype=dtype) if gated else None,
                    initial_state=draw(rows, D, N, dtype=torch.float32),
                    **options,
                )
            )
    for kind in (dtype, torch.complex64):
        state = draw(2, D, dtype=torch.promote_types(kind, torch.float32), grad=False)
        yield lambda kind=kind, state=state: ops.linear_scan_step(
            *(draw(2, D, dtype=kind, grad=False) for _ in range(2)), state
        )
    for N, gated in itertools.product((16, 64, 128), (False, True)):
        yield lambda N=N, gated=gated: ops.selective_scan_step(
            *(draw(2, D, dtype=dtype, grad=False) for _ in range(2)),
            draw(D, N, dtype=torch.float32, grad=False),
            *(draw(2, N, dtype=dtype, grad=False) for _ in range(2)),
            draw(D, dtype=torch.float32, grad=False) if gated else None,
            draw(2, D, dtype=dtype, grad=False) if gated else None,
            draw(2, D, N, dtype=torch.float32, grad=False),
        )


def conv_cases(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    D, W = 96, 4
    for length, packed, activation, bias, carried in itertools.product(
        (200, 1), (False, True), (None, "silu"), (False, True), (False, True)
    ):

        def call(length=length, packed=packed, activation=activation, bias=bias, carried=carried) -> None:
            rows = 2 if packed else 1
            inputs = draw(1, length, D, dtype=dtype), draw(D, W, dtype=dtype), draw(D, dtype=dtype) if bias else None
            options = {
                "activation": activation,
                "state": draw(rows, D, W - 1, dtype=dtype, grad=False) if carried else None,
                "cu_seqlens": torch.tensor([0, length // 3, length]) if packed else None,
            }
            if length > 1:
                backward(ops.causal_conv1d(*inputs, **options))
            else:
                with torch.no_grad():
                    ops.causal_conv1d(*inputs, **options)

        yield call


# ---- compiling, and reading what came out -------------------------------------------------------------------------


def capture(on_launch: Callable[..., None]) -> None:
    """From here on, launching a kernel calls `on_launch(kernel, grid, arguments, constants)` instead."""

    Kernel.launch = lambda self, grid, *arguments, **constants: on_launch(self.jit, grid, arguments, constants)
    backends._why_not_triton = lambda x: None


def name_of(kernel: JITFunction) -> str:
    """With the folder in `kernels/` that it is in."""
    return f"{kernel.__module__.removeprefix('lm_zoo.kernels.').split('.')[0]}/{kernel.__name__}"


def launch_cases(target: str, size: int, dtype: torch.dtype) -> None:
    """Everything that the ops launch on this target with heads of this size."""
    driver.set_active(NoDevice(target))
    launch.device_class = lambda device: TARGETS[target][1]
    with backends.use_backend("triton"):
        for call in cases(size, dtype):
            call()


def compile_cases(targets: list[str], sizes: list[int], dtype: torch.dtype, only: str) -> list[Report]:
    """Of the kernels with `only` in their names."""
    seen, reports = set(), {}

    def compile_only(kernel, grid, arguments, constants) -> None:
        if only not in (name := name_of(kernel)):
            return
        take_newer_assembler(driver.active.get_current_target().arch)
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **constants)  # compiles, and runs nothing
        key = name, driver.active.name, size
        if (*key, compiled.hash) not in seen:
            seen.add((*key, compiled.hash))
            reports.setdefault(key, Report(*key)).add(read(compiled, *key))

    capture(compile_only)
    for target, size in itertools.product(targets, sizes):
        launch_cases(target, size, dtype)
    return list(reports.values())


def read(kernel, name: str, target: str, size: int) -> Report:
    """What the compiler made of one kernel."""
    dots = [line for line in kernel.asm["ttgir"].splitlines() if PRODUCT.search(line)]
    off = [line for line in dots if re.search(r"-> tensor<[^>]*#blocked", line)]
    report = Report(
        name, target, size, shared_bytes=kernel.metadata.shared, products=len(dots), off_matrix_units=len(off)
    )
    report.refilled_early = len(refilled_early(kernel.asm["ttgir"]))
    if target.startswith("hip"):
        text = kernel.asm["amdgcn"]
        report.registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        report.spilled_bytes = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        report.matrix_instructions = " ".join(sorted(set(re.findall(r"v_mfma", text))))
        return report
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    report.registers = int(re.search(r"REG:(\d+)", usage)[1])
    # The stack also holds what the compiler indexes; only loads and stores from it are spills.
    report.spilled_bytes = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])
    report.matrix_instructions = " ".join(sorted(set(re.findall(r"\b(U?[A-Z]*[HQDI]G?MMA)\b", code))))
    return report


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def print_table(reports: list[Report]) -> None:
    table = Table("kernel", "target", "size", "variants", "registers", "spilled", "shared", "products", "instructions")
    for r in reports:
        products = f"{r.products - r.off_matrix_units} of {r.products}" if r.products else ""
        numbers = map(str, (r.size, r.variants, r.registers, r.spilled_bytes, r.shared_bytes))
        table.add_row(r.kernel, r.target, *numbers, products, r.matrix_instructions)
    Console(width=150).print(table)


def write(path: Path, reports: list[Report], made_with: dict[str, str]) -> None:
    """Into a file of the same versions and dtype if there is one: it keeps what was not compiled this time."""
    rows = [{name: x for name, x in asdict(r).items() if name != "refilled_early"} for r in reports]  # it is 0
    if path.exists():
        before = json.loads(path.read_text())
        if {name: before[name] for name in made_with} == made_with:
            now = {(r.kernel, r.target, r.size) for r in reports}
            rows += [r for r in before["kernels"] if (r["kernel"], r["target"], r["size"]) not in now]
    rows.sort(key=lambda r: (r["kernel"], r["target"], r["size"]))
    path.write_text(json.dumps(made_with | {"kernels": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES), help="channels of a head")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--json", type=Path, help="also write the table to this file, beside what it has")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    dtype = arguments.dtype
    reports = compile_cases(arguments.targets, arguments.sizes, getattr(torch, dtype), arguments.only)
    reports.sort(key=lambda r: (r.kernel, r.target, r.size))
    print_table(reports)
    if arguments.json:
        write(arguments.json, reports, {"triton": triton.__version__, "torch": torch.__version__} | {"dtype": dtype})
    missed = [(r, bar) for r in reports for bar in r.missed()]
    for r, bar in missed:
        print(f"bar missed: {r.kernel} on {r.target} at {r.size}: {bar}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
