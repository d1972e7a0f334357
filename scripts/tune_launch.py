"""Finds launch parameters for the passes of linear attention on this machine's GPU: `python scripts/tune_launch.py`.

Each candidate for an entry of `TABLE` (`triton_passes/launch.py`) is first checked, in a process of its own, against
float64 (`verify_launch.py`); what is right is timed under every decay and update that runs it. Printed are the entries
that are faster on the whole and nowhere much slower, for the table. What stands in the table is checked, too. Without
--all, candidates are the few in `PROMISING`. Most of the time is compiling, on all CPU cores.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from triton.testing import do_bench
from verify_launch import use

from lm_zoo.kernels.linear_attention import triton_passes as passes
from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, device_class

VERIFY = Path(__file__).with_name("verify_launch.py")
SHAPES = {64: (8, 4096, 32), 128: (1, 8192, 96), 256: (4, 2048, 32)}  # size of a head: B, T, H
DEVICE = torch.device("cuda")
SLOWER = 1.03  # than now, under one decay and update, is not adopted
BLOCKS = {
    "chunk_states_kernel": (16, 32, 64),
    "chunk_states_kernel, per channel": (16, 32, 64),
    "chunk_states_kernel, additive": (16, 32, 64),
    "chunk_states_kernel, additive, per channel": (16, 32, 64),
    "chunk_states_backward_kernel": (16, 32, 64),
    "chunk_states_backward_kernel, per channel": (16, 32, 64),
    "chunk_states_backward_kernel, additive": (16, 32, 64),
    "chunk_states_backward_kernel, additive, per channel": (16, 32, 64),
    "chunk_output_kernel": (64, 128),
    "chunk_output_backward_kernel": (64, 128),
    "chunk_gradients_kernel": (32, 64),
    "chunk_gradients_kernel, per channel": (32, 64),
    "delta_apply_kernel": (32, 64, 128),
    "delta_transform_backward_kernel": (32, 64),
    "key_scores_kernel": (32, 64),
    "channel_scores_kernel": (32, 64),
    "channel_scores_backward_kernel": (16, 32, 64),
    "channel_scores_backward_kernel, additive": (16, 32, 64),
}
# By size of a head. Beside what stands in the table: what it replaced, where an emulator of the machine code alone has
# seen the new entry to be right (docs/gpu/nvidia-h200.md), and what looks good on paper. Not among them: (64, 8, 2) of
# chunk_states_backward_kernel, which once reached outside its memory at 128, nobody knows why.
TILES = {
    "chunk_states_backward_kernel": [(64, 8, 1)],
    "chunk_states_backward_kernel, additive": [(32, 4, 2), (64, 4, 2)],
    "chunk_states_backward_kernel, additive, per channel": [(32, 4, 2), (64, 8, 2)],
    "chunk_gradients_kernel": [(32, 8, 2), (64, 8, 2)],
    "chunk_gradients_kernel, per channel": [(32, 8, 2), (64, 8, 2)],
    "delta_transform_backward_kernel": [(64, 8, 1), (64, 4, 1)],
    "channel_scores_kernel": [(32, 4, 1)],
    "channel_scores_backward_kernel": [(64, 8, 1), (32, 4, 1)],
    "channel_scores_backward_kernel, additive": [(32, 8, 1), (64, 8, 1)],
}
PROMISING = {
    64: TILES | {"chunk_states_backward_kernel": [(64, 4, 2)]},
    128: TILES
    | {
        "chunk_states_kernel": [(32, 4, 2)],
        "chunk_states_kernel, per channel": [(32, 4, 2)],
        "chunk_states_kernel, additive": [(64, 4, 2)],
        "chunk_states_kernel, additive, per channel": [(32, 4, 2)],
    },
    256: {
        "chunk_states_kernel": [(32, 4, 2), (64, 8, 2)],
        "chunk_states_kernel, additive": [(64, 8, 2)],
        "chunk_states_kernel, additive, per channel": [(32, 8, 2)],
        "chunk_states_backward_kernel, additive": [(32, 4, 2), (64, 8, 2)],
        "chunk_states_backward_kernel, additive, per channel": [(32, 8, 2)],
        "chunk_output_backward_kernel": [(64, 4, 2), (128, 8, 2)],
        "chunk_gradients_kernel": [(32, 8, 2), (64, 8, 2)],
        "chunk_gradients_kernel, per channel": [(64, 8, 2)],
        "delta_transform_backward_kernel": [(64, 8, 1)],
        "channel_scores_backward_kernel": [(64, 8, 1)],
        "channel_scores_backward_kernel, additive": [(32, 8, 1)],
    },
}


def passes_of(decay: str, delta: bool, shape: tuple[int, ...], size: int) -> dict[str, Callable[[], object]]:
    """By key of the table, a call of each pass that this kind of op runs, on bfloat16 inputs."""
    B, T, H = shape

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    q, v, do = (draw(B, T, H, size) for _ in range(3))
    k = torch.nn.functional.normalize(draw(B, T, H, size), dim=-1)
    segment, scale = passes.cut(q, v, None), size**-0.5
    gates = {"none": None, "token": (B, T, H), "channel": (B, T, H, size)}[decay]
    G = None if gates is None else passes.cumulative_decay(-draw(*gates, dtype=torch.float32).abs() / 16, segment)
    state = torch.zeros(B, H, size, size, device="cuda")
    calls = {}
    A_qk, A_kk = passes.chunk_scores(q, k, G, scale, segment, delta=delta)
    if delta or decay == "channel":
        key = "channel_scores_kernel" if decay == "channel" else "key_scores_kernel"
        calls[key] = lambda: passes.chunk_scores(q, k, G, scale, segment, delta=delta)
    u, w, beta, T_delta = v, None, None, None
    if delta:
        beta = draw(B, T, H).sigmoid()
        T_delta = passes.delta_transform(A_kk, beta, segment)
        u, w = passes.delta_apply(T_delta, k, v, G, beta, segment)
        calls["delta_apply_kernel"] = lambda: passes.delta_apply(T_delta, k, v, G, beta, segment)
    states, v_new = passes.chunk_states(k, u, w, G, state.clone(), segment)
    additive, per_channel = ", additive" * (not delta), ", per channel" * (decay == "channel")
    key = "chunk_states_kernel" + additive + per_channel
    calls[key] = lambda: passes.chunk_states(k, u, w, G, state, segment)
    calls["chunk_output_kernel"] = lambda: passes.chunk_output(q, k, v_new, G, A_qk, states, scale, segment)
    dv = torch.randn_like(do) if delta else None  # what is in it takes no time
    dstates = passes.chunk_states_backward(do, dv, state.clone(), q, k, w, G, scale, segment)
    key = "chunk_states_backward_kernel" + additive + per_channel
    calls[key] = lambda: passes.chunk_states_backward(do, dv, state, q, k, w, G, scale, segment)
    output = (do, q, k, G, A_qk, None if delta else dstates, scale, segment)
    du = passes.chunk_output_backward(*output)
    calls["chunk_output_backward_kernel"] = lambda: passes.chunk_output_backward(*output)
    gradients = (do, du, q, k, v_new, G, states, dstates, scale, segment)
    wanted = {"delta": delta, "decay_gradient": G is not None}
    dq, dk, dw, dG, _, dA_qk = passes.chunk_gradients(*gradients, **wanted)
    calls["chunk_gradients_kernel" + per_channel] = lambda: passes.chunk_gradients(*gradients, **wanted)
    dA_kk = None
    if delta:
        transform = (du, dw, T_delta, u, w, k, v, G, beta, A_kk, dk, dG, segment)
        dA_kk = passes.delta_transform_backward(*transform)[0]
        calls["delta_transform_backward_kernel"] = lambda: passes.delta_transform_backward(*transform)
    if decay == "channel":
        scores = (dA_qk, dA_kk, q, k, G, A_qk, A_kk, scale, dq, dk, dG, segment)
        key = "channel_scores_backward_kernel" + additive
        calls[key] = lambda: passes.chunk_scores_backward(*scores)
    return calls


def now(key: str, size: int) -> Launch:
    return (TABLE.get((key, device_class(DEVICE))) or TABLE[key, "large"])[size]


def candidates(key: str, size: int, everything: bool) -> list[Launch]:
    values = itertools.product(BLOCKS[key], (4, 8), (1, 2)) if everything else PROMISING[size].get(key, [])
    return [Launch(*entry) for entry in values]


def verify(key: str, size: int, entry: Launch) -> str | None:
    """What is wrong with it, or `None`."""
    command = [sys.executable, str(VERIFY), key, str(size), *map(str, entry)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "takes longer than 240 s"
    if done.returncode == 0:
        return None
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    return "; ".join(wrong) or (done.stderr.strip().splitlines() or [f"ends with {done.returncode}"])[-1]


def verified(jobs: list[tuple[str, int, Launch]]) -> set[tuple[str, int, Launch]]:
    """Those that are right; in parallel, as it is compiling that takes the time."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        found = dict(zip(jobs, pool.map(lambda job: verify(*job), jobs), strict=True))
    for (key, size, entry), wrong in found.items():
        print(f"{'right' if wrong is None else 'WRONG'} {size} {key} {tuple(entry)} {wrong or ''}", flush=True)
    return {job for job, wrong in found.items() if wrong is None}


def times(size: int, right: set[tuple[str, int, Launch]]) -> dict[tuple[str, Launch], list[float]]:
    """Milliseconds of each entry under every decay and update, those of the present one among them."""
    found = {}
    keys = {key for key, of, _ in right if of == size}
    for decay, delta in itertools.product(("none", "token", "channel"), (False, True)):
        calls = passes_of(decay, delta, SHAPES[size], size)
        for key in keys & calls.keys():
            before = now(key, size)
            for entry in [before, *(entry for name, of, entry in right if (name, of) == (key, size))]:
                use(key, size, entry)
                ms = do_bench(calls[key], warmup=3, rep=15, return_mode="median")
                found.setdefault((key, entry), []).append(ms)
                print(
                    f"{ms:8.3f} ms {size} {key} {tuple(entry)} {decay} {'delta' if delta else 'additive'}", flush=True
                )
            use(key, size, before)
    return found


def adopt(size: int, found: dict[tuple[str, Launch], list[float]]) -> None:
    """Prints the lines for the table."""
    for key in dict.fromkeys(key for key, _ in found):
        present = now(key, size)
        ratios = {
            entry: [ms / before for ms, before in zip(taken, found[key, present], strict=True)]
            for (name, entry), taken in found.items()
            if name == key and entry != present
        }
        ratios = {entry: values for entry, values in ratios.items() if max(values) < SLOWER}
        best = min(ratios, key=lambda entry: prod(ratios[entry]), default=None)
        if best is not None and prod(ratios[best]) < 1:
            mean = prod(ratios[best]) ** (1 / len(ratios[best]))
            print(f'TABLE["{key}", "{device_class(DEVICE)}"] {size}: Launch{tuple(best)}  # {mean:.2f} of the time')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, choices=SHAPES, default=[128])
    parser.add_argument("--only", default="", help="entries with this in their key")
    parser.add_argument("--all", action="store_true", help="all combinations of sizes, warps and stages")
    arguments = parser.parse_args()
    start = time.monotonic()
    keys = [key for key in BLOCKS if arguments.only in key]
    jobs = [
        (key, size, entry)
        for size, key in itertools.product(arguments.sizes, keys)
        for entry in dict.fromkeys([now(key, size), *candidates(key, size, arguments.all)])
    ]
    right = verified(jobs)
    print(f"{len(right)} of {len(jobs)} are right, after {time.monotonic() - start:.0f} s", flush=True)
    for size in arguments.sizes:
        adopt(size, times(size, {job for job in right if arguments.all or job[0] in PROMISING[size]}))
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
