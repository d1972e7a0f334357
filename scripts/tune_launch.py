"""Finds launch parameters for the passes of linear attention on this machine's GPU: `python scripts/tune_launch.py`.

Every pass is timed with every candidate for its entry in `TABLE` (`triton_passes/launch.py`), for heads of some size
and each kind of decay and update. Candidates are compiled in parallel first. Prints the best ones beside the entry that
stands in the table, to be written there by hand.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable

import torch
from triton.testing import do_bench

from lm_zoo.kernels.linear_attention import triton_passes as passes
from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, device_class

SHAPES = {64: (8, 4096, 32), 128: (1, 8192, 96), 256: (4, 2048, 32)}  # size of a head: B, T, H
DEVICE = torch.device("cuda")
VARIANTS = [("none", False), ("token", False), ("token", True), ("channel", False), ("channel", True)]
BLOCKS = {
    "chunk_states_kernel": (16, 32, 64),
    "chunk_states_backward_kernel": (16, 32, 64),
    "chunk_states_backward_kernel, per channel": (16, 32, 64),
    "chunk_output_kernel": (64, 128),
    "chunk_output_backward_kernel": (32, 64),
    "chunk_gradients_kernel": (32, 64),
    "delta_apply_kernel": (32, 64, 128),
    "delta_transform_backward_kernel": (32, 64),
    "key_scores_kernel": (32, 64),
    "channel_scores_kernel": (32, 64),
    "channel_scores_backward_kernel": (16, 32, 64),
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
    calls["chunk_states_kernel"] = lambda: passes.chunk_states(k, u, w, G, state, segment)
    calls["chunk_output_kernel"] = lambda: passes.chunk_output(q, k, v_new, G, A_qk, states, scale, segment)
    dv = passes.chunk_output_backward(do, q, k, G, A_qk, scale, segment)
    calls["chunk_output_backward_kernel"] = lambda: passes.chunk_output_backward(do, q, k, G, A_qk, scale, segment)
    dstates = passes.chunk_states_backward(do, dv, state.clone(), q, k, w, G, scale, segment)
    key = "chunk_states_backward_kernel" + ", per channel" * (decay == "channel")
    calls[key] = lambda: passes.chunk_states_backward(do, dv, state, q, k, w, G, scale, segment)
    gradients = (do, dv, q, k, v_new, G, states, dstates, scale, segment)
    dq, dk, dw, dG, _, dA_qk = passes.chunk_gradients(*gradients, delta=delta)
    calls["chunk_gradients_kernel"] = lambda: passes.chunk_gradients(*gradients, delta=delta)
    dA_kk = None
    if delta:
        transform = (dv, dw, T_delta, u, w, k, v, G, beta, A_kk, dk, dG, segment)
        dA_kk = passes.delta_transform_backward(*transform)[0]
        calls["delta_transform_backward_kernel"] = lambda: passes.delta_transform_backward(*transform)
    if decay == "channel":
        scores = (dA_qk, dA_kk, q, k, G, A_qk, A_kk, scale, dq, dk, dG, segment)
        calls["channel_scores_backward_kernel"] = lambda: passes.chunk_scores_backward(*scores)
    return calls


def entries(key: str) -> dict[int, Launch]:
    return TABLE.get((key, device_class(DEVICE))) or TABLE[key, "large"]


def candidates(key: str) -> list[Launch]:
    return [Launch(*values) for values in itertools.product(BLOCKS[key], (4, 8), (1, 2))]


def with_entry(key: str, size: int, entry: Launch, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        before = entries(key)
        TABLE[key, device_class(DEVICE)] = before | {size: entry}
        try:
            return call()
        finally:
            TABLE[key, device_class(DEVICE)] = before

    return run


def compile_share(size: int, variant: tuple[str, bool], share: int, shares: int) -> None:
    """Compiles every so many-th candidate, on few tokens."""
    calls = passes_of(*variant, (1, 512, SHAPES[size][2]), size)
    for i, (key, call) in enumerate(calls.items()):
        for j, entry in enumerate(candidates(key)):
            if (i + j) % shares == share:
                attempt(with_entry(key, size, entry, call))


def attempt(run: Callable[[], object], time: bool = False) -> float | None:
    """Milliseconds, or `None` where the device has no room for the tiles."""
    from triton.runtime.errors import OutOfResources

    try:
        run()
        return do_bench(run, warmup=3, rep=12, return_mode="median") if time else 0.0
    except OutOfResources:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", type=int, default=range(len(VARIANTS)), help="their numbers")
    arguments = parser.parse_args()
    processes = max(1, (os.cpu_count() or 2) - 1)
    variants = [VARIANTS[number] for number in arguments.variants]
    jobs = [(*job, share, 4) for job in itertools.product(arguments.sizes, variants) for share in range(4)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(compile_share, jobs, chunksize=1)
    for size, variant in itertools.product(arguments.sizes, variants):
        for key, call in passes_of(*variant, SHAPES[size], size).items():
            present = entries(key)[size]
            times = {c: attempt(with_entry(key, size, c, call), time=True) for c in candidates(key)}
            times = {c: ms for c, ms in times.items() if ms is not None}
            now = attempt(with_entry(key, size, present, call), time=True)
            best = sorted(times, key=times.get)[:3]
            found = "  ".join(f"{tuple(c)} {times[c]:.3f}" for c in best)
            kind = f"{size} {variant[0]} {'delta' if variant[1] else 'additive'}"
            print(f"{kind:20} {key:44} now {tuple(present)} {now:.3f}  best {found}", flush=True)


if __name__ == "__main__":
    main()
