"""`@kernel` in the place of `@triton.jit`, for the functions that are launched: `a_kernel[grid](*tensors, BLOCK=64)`.

A launch of Triton's own takes 10 us of the host, to find out whether it has compiled the kernel for arguments like
these; here it takes half. And at the first call of an op its kernels are compiled side by side (`first_call.py`).
"""

import functools
import inspect
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
    with _Compilers() as compilers, triton.AsyncCompileMode(compilers, ignore_errors=True):
        yield
