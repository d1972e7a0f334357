"""How kernels are compiled and launched, without a GPU: compiled for one that is not there, their launches recorded."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SETUP = """
import os
import threading
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lm_zoo.kernels import triton_kernel
from lm_zoo.kernels.first_call import compiles_at_once

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    set_current_device = staticmethod(lambda device: None)

driver.set_active(NoDevice())
compiled, launched, threads = [], [], []
triton.knobs.runtime.jit_post_compile_hook = lambda fn, **_: compiled.append(fn.name)

class Recorded:  # what is launched in the place of a compiled kernel
    def __init__(self, kernel):
        self.name = kernel.name
    def __getitem__(self, grid):
        return lambda *arguments: launched.append((self.name, grid, arguments))

Compiled = triton.compiler.CompiledKernel
Compiled.__getitem__ = lambda self, grid: Recorded(self)[grid]
Compiled.run = property(lambda self: threads.append(threading.current_thread()))

@triton_kernel.kernel
def copy_kernel(x, y, T, D, scale, skip, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < T * D) * scale, mask=i < T * D)

@triton_kernel.kernel
def double_kernel(x, y, T, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < T), mask=i < T)
"""

KEYS = """
x = torch.zeros(100)
def launches(*changed, **constants):
    before = len(compiled)
    copy_kernel[(1,)](*changed, **({"BLOCK": 16} | constants))
    return len(compiled) - before

assert launches(x, x, 100, 3, 0.5, None) == 1
assert launches(x, x, 1, 3, 2.0, None) == 0, "a length, or a factor"
assert launches(x, x, 64, 3, 0.5, None) == 0, "a length that 16 divides"
assert launches(x, x, 100, 5, 0.5, None) == 0, "a number like the other"
assert launches(x, x, 100, 1, 0.5, None) == 1, "one"
assert launches(x, x, 100, 32, 0.5, None) == 1, "a number that 16 divides"
assert launches(x, x, 100, 2**40, 0.5, None) == 1, "a long one"
assert launches(x[1:], x, 100, 3, 0.5, None) == 1, "an address"
assert launches(x.half(), x, 100, 3, 0.5, None) == 1, "a dtype"
assert launches(x, x, 100, 3, 0.5, x) == 1, "a tensor that was not there"
assert launches(x, x, 100, 3, 0.5, None, BLOCK=32) == 1, "a constant"
assert launches(x, x, 100, 3, 0.5, None, num_warps=8) == 1, "an option"
assert launches(x, x, 100, 3, 0.5, None) == 0
assert launched[-1][1:] == ((1, 1, 1), (x, x, 100, 3, 0.5, None, 16)), launched[-1]
"""

FIRST_CALL = """
@compiles_at_once
def op(x, wrong=False):
    y = torch.empty_like(x)
    copy_kernel[(7,)](x, y, len(x), 3, 0.5, None, BLOCK=16)
    if wrong:
        raise ZeroDivisionError
    double_kernel[(7,)](y, y, len(x), BLOCK=16)
    return y

main = threading.main_thread()
try:
    op(torch.zeros(10), wrong=True)
except ZeroDivisionError:
    assert launched == [], "an error in the rehearsal ends the call"
assert sorted(compiled) == ["copy_kernel"]
y = op(torch.zeros(100))
assert sorted(compiled) == ["copy_kernel", "double_kernel"], compiled
assert len(threads) == 2 and main not in threads, "compiled and loaded on threads"
assert [name for name, *_ in launched] == ["copy_kernel", "double_kernel"], "once, and after all are compiled"
assert launched[-1][2][0] is y
op(torch.zeros(30))
assert len(compiled) == 2 and len(launched) == 4
double_kernel.compiled.clear()
op(torch.zeros(30))
assert len(launched) == 4 + 3, "given up at the second kernel, rehearsed, and run"
double_kernel[(1,)](y.half(), y, 100, BLOCK=16)
assert len(threads) == 2 and len(compiled) == 3, "outside of an op a kernel is compiled where it is launched"

@compiles_at_once
def follow(x):
    double_kernel[(7,)](x, x, len(x), BLOCK=32)

@compiles_at_once(then=lambda arguments, results: follow(results))
def lead(x):
    y = torch.empty_like(x)
    copy_kernel[(7,)](x, y, len(x), 3, 0.5, None, BLOCK=32)
    return y

compiled.clear(), launched.clear()
y = lead(torch.zeros(100))
assert sorted(compiled) == ["copy_kernel", "double_kernel"], "what follows is compiled along"
assert [name for name, *_ in launched] == ["copy_kernel"], "and is not run"
follow(y)
assert len(compiled) == 2 and [name for name, *_ in launched] == ["copy_kernel", "double_kernel"]
"""

REHEARSAL = """
from lm_zoo.kernels import backends, linear_attention
from lm_zoo.kernels.first_call import NotCompiled, stage

known = set()
def launch(self, grid, *arguments, **constants):
    kinds = [x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments]
    key = (self.__name__, *kinds, *constants.items())
    if key not in known and stage.get() == "give up":
        raise NotCompiled
    known.add(key)

triton_kernel.Kernel.launch = launch
backends._why_not_triton = lambda x: None

def draw(*shape, learned=True):
    return torch.zeros(shape, requires_grad=learned)

for decay in (None, (2,), (1, 70, 2), (1, 70, 2, 16)):
    for learned in (True, False):
        for beta in (None, draw(1, 70, 2)):
            known.clear()
            gates = None if decay is None else draw(*decay, learned=learned)
            o, _ = linear_attention(*(draw(1, 70, 2, 16) for _ in range(3)), gates, beta, backend="triton")
            rehearsed = set(known)
            o.sum().backward()
            assert known == rehearsed, (decay, learned, known - rehearsed)
            summed_back = any(name == "cumulative_decay_backward_kernel" for name, *_ in known)
            assert summed_back == (decay is not None and learned), "the gradient of a decay where it is wanted"
"""

TOOLS = """
tools = triton.knobs.nvidia
older, newer = tools.ptxas.path, tools.ptxas_blackwell.path
assert older != newer
triton_kernel.TRITON_VERSION = 3, 9
triton_kernel.take_newer_assembler(90)
assert tools.ptxas.path == older, "Triton 3.9 sees to it itself"
triton_kernel.TRITON_VERSION = 3, 6
triton_kernel.take_newer_assembler(80)
assert tools.ptxas.path == older, "another GPU"
triton_kernel.take_newer_assembler.cache_clear()
os.environ["TRITON_PTXAS_PATH"] = older
triton_kernel.take_newer_assembler(90)
assert tools.ptxas.path == older, "the user's choice"
triton_kernel.take_newer_assembler.cache_clear()
del os.environ["TRITON_PTXAS_PATH"]
copy_kernel[(1,)](torch.zeros(9), torch.zeros(9), 9, 3, 0.5, None, BLOCK=16)
assert tools.ptxas.path == newer, "a launch on Hopper"

import importlib.util, shutil, sysconfig, tempfile
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
with tempfile.TemporaryDirectory() as folder, triton_kernel.compile_in_background():
    assert triton.knobs.build.impl is triton_kernel._build_quickly
    if shutil.which("gcc") and os.path.exists(header):
        source = os.path.join(folder, "answer.c")
        with open(source, "w") as file:
            file.write('#include <Python.h>\\nstatic struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer"};\\n'
                       'PyMODINIT_FUNC PyInit_answer(void) { return PyModule_Create(&module); }\\n')
        library = triton.knobs.build.impl("answer", source, folder, [folder], [folder], ["m", "libm.so.6"])
        spec = importlib.util.spec_from_file_location("answer", library)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert triton.knobs.build.impl is None
triton.knobs.build.impl = print
with triton_kernel.compile_in_background():
    assert triton.knobs.build.impl is print, "the user's choice"
"""


@pytest.mark.parametrize(
    "script", [KEYS, FIRST_CALL, REHEARSAL, TOOLS], ids=["keys", "first call", "rehearsal", "tools"]
)
def test_kernels_are_compiled_once_for_arguments_that_are_alike(tmp_path, script):
    path = tmp_path / "script.py"  # a file: Triton reads the source of a kernel
    path.write_text(SETUP + script)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    environment.pop("TRITON_PTXAS_PATH", None)
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
