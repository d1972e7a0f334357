"""`@kernel` in the place of `@triton.jit`, for the functions that are launched: `a_kernel[grid](*tensors, BLOCK=64)`.

A launch of Triton's own takes 10 us of the host, to find out whether it has compiled the kernel for arguments like
these; here it takes half. And at the first call of an op its kernels are compiled side by side (`first_call.py`).
"""

import functools
import inspect
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from lm_zoo.kernels.first_call import NotCompiled, stage

# Arguments for whose values Triton must not compile a kernel anew: another prompt has another length.
LENGTHS = {"T", "rows", "tokens", "per_sequence"}
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Kernel:
    """Arguments that are not `constexpr` go by position, the others by name. Lengths must be in `LENGTHS`."""

    def __init__(self, function: Callable) -> None:
        lengths = LENGTHS.intersection(inspect.signature(function).parameters)
        self.jit = triton.jit(do_not_specialize=sorted(lengths))(function)
        self.compiled: dict[tuple, tuple] = {}
        functools.update_wrapper(self, function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found = [(x.dtype, x.data_ptr() & 15 == 0) if isinstance(x, Tensor) else _kind(x) for x in arguments]
        key = (driver.active.get_current_device(), *found, *constants.items())
        ready = self.compiled.get(key)
        if ready is None:
            if stage.get() == "give up":
                raise NotCompiled
            take_newer_assembler(driver.active.get_current_target().arch)
            compiled = self.jit.run(*arguments, grid=grid, warmup=True, **constants)
            if stage.get() == "rehearse":  # it is not compiled yet, only about to be
                return
            values = [constants[name] for name in self.jit.arg_names[len(arguments) :]]
            ready = self.compiled[key] = compiled, values
        if stage.get() != "rehearse":
            compiled, values = ready
            compiled[*grid, 1, 1](*arguments, *values)


def kernel(function: Callable) -> Any:
    # In the interpreter there is nothing to compile. On AMD a kernel also depends on the size of a tensor.
    plain = triton.knobs.runtime.interpret or torch.version.hip is not None
    return triton.jit(function) if plain else Kernel(function)


def _kind(x: float | int | None) -> object:
    """What of a number Triton compiles a kernel for: of an integer, whether it is 1 or divisible by 16, and width."""
    if not isinstance(x, int):
        return type(x)
    return x if x == 1 else (x & 15 == 0, x >> 31)


@functools.cache
def take_newer_assembler(arch: int | str) -> None:
    """Triton before 3.9 assembles for Hopper with the older ptxas of the two that it brings, of CUDA 12.8, which gets
    addresses of operands of products wrong: `chunk_output` with 40 channels of K and 24 of V. From 3.9 on it takes the
    newer one, the one for Blackwell, itself."""
    tools = triton.knobs.nvidia
    if arch == 90 and TRITON_VERSION < (3, 9) and "TRITON_PTXAS_PATH" not in os.environ:
        tools.ptxas = tools.ptxas_blackwell.path


class _Compilers(ThreadPoolExecutor):
    """A thread that has compiled a kernel also loads it, and builds the C function that launches it."""

    def __init__(self) -> None:
        super().__init__(initializer=driver.active.set_current_device, initargs=(driver.active.get_current_device(),))

    def submit(self, compile_one: Callable) -> Future:
        def compile_and_load() -> Any:
            compiled = compile_one()
            _ = compiled.run  # made when it is first asked for
            return compiled

        return super().submit(compile_and_load)


@contextmanager
def compile_in_background() -> Iterator[None]:
    """Kernels that are compiled in the block are so on threads, and are done at its end. One that cannot be compiled is
    left out: it raises when it is launched."""
    build = triton.knobs.build
    before, build.impl = build.impl, build.impl or _build_quickly
    try:
        with _Compilers() as compilers, triton.AsyncCompileMode(compilers, ignore_errors=True):
            yield
    finally:
        build.impl = before


def _build_quickly(
    name: str, source: str, folder: str, library_dirs: list[str], include_dirs: list[str], libraries: list[str]
) -> str:
    """The C function that launches a kernel, which Triton before 3.9 builds for each: with -O0 for -O3 that takes less
    than half the time, and a launch takes no longer. Where this fails, Triton builds it when it is launched."""
    out = os.path.join(folder, name + sysconfig.get_config_var("EXT_SUFFIX"))
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    flags = [f"-l{':' if '.so' in library else ''}{library}" for library in libraries]
    flags += [f"-L{path}" for path in library_dirs]
    flags += [f"-I{path}" for path in [*include_dirs, folder, sysconfig.get_paths()["include"]]]
    subprocess.run([compiler, source, "-O0", "-shared", "-fPIC", "-o", out, *flags], check=True, capture_output=True)
    return out
