"""What the first call of an op costs, without a GPU: `python scripts/first_call.py gated-delta`.

The op runs forward and backward for cuda:90 in this process, with an empty cache, over a CUDA driver that does nothing:
a C library of a few lines. Printed are the seconds that the call took, and those that it kept CPUs busy: this process,
and the assembler and the C compiler that it starts. The latter two hardly depend on what else the machine does. With
`--kernels`, kernel by kernel and one after the other, both for each stage of the compiler.
"""

import argparse
import ctypes
import os
import resource
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

DRIVER = """
#include <stdint.h>
#define OK(name) int name(void) { return 0; }
OK(cuCtxGetCurrent) OK(cuCtxGetDevice) OK(cuCtxGetLimit) OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuInit)
OK(cuDevicePrimaryCtxRetain) OK(cuDriverGetVersion) OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuLaunchKernelEx)
OK(cuModuleUnload) OK(cuOccupancyMaxActiveClusters) OK(cuStreamIsCapturing) OK(cuTensorMapEncodeTiled)
OK(cuTensorMapEncodeIm2col)
int cuGetErrorString(int error, const char **text) { *text = ""; return 0; }
int cuDeviceGet(int *device, int i) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
"""
T, H, D = 256, 2, 128


def install_driver(folder: Path) -> None:
    """Before Triton is imported."""
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    flags = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    subprocess.run([os.environ.get("CC", "gcc"), *flags, str(source), "-o", str(library)], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # by its name, it is the one that Triton finds
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": str(folder), "TRITON_INTERPRET": "0"}
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def install_target() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from lm_zoo.kernels import backends
    from lm_zoo.kernels.linear_attention.triton_passes import launch

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = self.get_current_stream = lambda *_: 0
            self.set_current_device = lambda _: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    backends._why_not_triton = lambda x: None
    launch.device_class = lambda device: "hopper"


def calls() -> dict[str, Callable[[], object]]:
    import torch

    from lm_zoo import kernels as ops

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def attention(gates: tuple[int, ...] | None, delta: bool) -> None:
        decay = None if gates is None else draw(*gates, dtype=torch.float32).requires_grad_(len(gates) > 1)
        beta = draw(1, T, H) if delta else None
        ops.linear_attention(*(draw(1, T, H, D) for _ in range(3)), decay, beta)[0].float().sum().backward()

    def selective() -> None:
        x, dt, B, C, z = (draw(1, 3000, size) for size in (96, 96, 16, 16, 96))
        A, skip = draw(96, 16, dtype=torch.float32), draw(96, dtype=torch.float32)
        ops.selective_scan(x, dt, A, B, C, skip, z)[0].float().sum().backward()

    return {
        "retention": lambda: attention((H,), False),
        "gla": lambda: attention((1, T, H, D), False),
        "gated-delta": lambda: attention((1, T, H), True),
        "kda": lambda: attention((1, T, H, D), True),
        "selective-scan": selective,
    }


def busy() -> tuple[float, float]:
    """CPU seconds, of this process and of those that it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def print_kernels() -> None:
    """From here on a launch compiles its kernel, and prints what that cost."""
    from lm_zoo.kernels.triton_kernel import Kernel

    seen = set()

    def launch(self: Kernel, grid: tuple, *arguments: object, **constants: object) -> None:
        before = busy()
        compiled = self.jit.run(*arguments, grid=grid, warmup=True, **constants)
        middle = busy()
        _ = compiled.run
        after = busy()
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            own, children, launcher = (middle[0] - before[0], middle[1] - before[1], sum(after) - sum(middle))
            print(f"{self.__name__:34} Triton {own:5.2f}   ptxas {children:5.2f}   launcher {launcher:5.2f}")

    Kernel.launch = launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=("retention", "gla", "gated-delta", "kda", "selective-scan"))
    parser.add_argument("--kernels", action="store_true", help="kernel by kernel, one after the other")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        install_driver(Path(folder))
        install_target()
        if arguments.kernels:
            print_kernels()
        call = calls()[arguments.op]
        from lm_zoo.kernels.backends import use_backend

        before, start = busy(), time.perf_counter()
        with use_backend("triton"):
            call()
        taken, after = time.perf_counter() - start, busy()
        own, children = after[0] - before[0], after[1] - before[1]
        print(f"{arguments.op}: {taken:.2f} s; CPUs busy for {own:.2f} s here and {children:.2f} s in other processes")


if __name__ == "__main__":
    main()
