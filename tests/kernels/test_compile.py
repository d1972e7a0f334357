"""Every kernel is compiled for a GPU that is not there, and stays within its bars: a part of what
`scripts/compile_kernels.py` does for all targets, sizes and flags."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("pipelines", ROOT / "scripts" / "pipelines.py")
pipelines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pipelines)
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
NAMES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, compile_kernels
names = set()
compile_kernels.capture(lambda kernel, grid, arguments, constants: names.add(compile_kernels.name_of(kernel)))
compile_kernels.launch_cases("cuda:90", 64, torch.bfloat16)
print(*names)
"""


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_the_cases_launch_every_kernel_in_the_tree(tmp_path):
    written = {
        f"{path.relative_to(ROOT / 'kernels').parts[0]}/{name}"
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    }
    assert len(written) > 20
    done = python("-c", NAMES, str(SCRIPT.parent), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == written


@pytest.mark.parametrize(
    ("target", "only", "instruction"),
    [
        ("cuda:80", "key_scores_kernel", "HMMA"),
        pytest.param("cuda:90", "chunk_", "HGMMA", marks=pytest.mark.slow),
        pytest.param("cuda:80", "", "HMMA", marks=pytest.mark.slow),
    ],
)
def test_kernels_stay_within_their_bars(tmp_path, target, only, instruction):
    out = tmp_path / "kernels.json"
    arguments = ("--targets", target, "--sizes", "64", "--only", only, "--json", str(out))
    done = python(str(SCRIPT), *arguments, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(out.read_text())["kernels"]
    assert reports
    for report in reports:
        assert report["registers"] > 0, report
        if report["products"]:
            assert instruction in report["matrix_instructions"].split(), report
            assert report["off_matrix_units"] == 0, report


@pytest.mark.parametrize(
    ("slots", "pendings", "loaded", "wrong"),
    [
        (1, 3, "%slot", {"S_1"}),  # what Triton makes of a tile that a product and registers share
        (2, 3, "%slot", set()),
        (1, 0, "%slot", set()),  # the product is over before the next load
        (1, 3, "%other", set()),  # never loaded anew
    ],
)
def test_operands_loaded_anew_under_a_product_are_found(slots, pendings, loaded, wrong):
    """On an H200, a program like the first gave gradients 3 % off."""
    program = f"""
    %S_1 = ttg.local_alloc : () -> !ttg.memdesc<{slots}x32x32xf16, #shared, #smem, mutable>
    %slot = ttg.memdesc_index %S_1[%c0] : !ttg.memdesc<{slots}x32x32xf16, #shared, #smem, mutable> -> !ttg.memdesc
    %token = ttg.async_copy_global_to_local %pointers, %slot mask %exists other %zeros : tensor<32x32x!tt.ptr<f16>>
    %9:2 = scf.for %v = %c0 to %c64 step %c32 iter_args(%total = %zeros, %waiting = %token) -> (tensor<64x32xf32>) {{
      %S = ttg.memdesc_trans %slot {{order = array<i32: 1, 0>}} : !ttg.memdesc<32x32xf16> -> !ttg.memdesc
      %dot = ttng.warp_group_dot %left, %S, %total {{isAsync = true}} : tensor<64x32xf16> * !ttg.memdesc<32x32xf16>
      %done:2 = ttng.warp_group_dot_wait %dot, %S {{pendings = {pendings} : i32}} : tensor<64x32xf32>
      %next = ttg.async_copy_global_to_local %pointers, {loaded} mask %exists other %zeros : tensor<32x32x!tt.ptr<f16>>
    }}
    """
    assert pipelines.refilled_early(program) == wrong
