"""What sequence parallelism sends, against ring attention: `python -m lm_zoo.eval.bench_sequence_parallel`.

Bytes that one rank takes in per layer, forward and backward, of one text of 2^20 tokens on 2 to 1,024 ranks, by the
formulas of `lm_zoo/kernels/sequence_parallel/volume.py`; layers of the 1.3B models, activations in bfloat16 and states
in float32. Before that the same layers really run on 2 and 4 processes here, on a short text in float32, and count what
they receive: it must be what the formulas say.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lm_zoo.config import ZooConfig
from lm_zoo.kernels.sequence_parallel import sequence_parallel
from lm_zoo.kernels.sequence_parallel.group import FORMS
from lm_zoo.kernels.sequence_parallel.volume import Messages, received, received_by_ring_attention
from lm_zoo.layers import Mixer

PRESETS = {
    "RetNet": "retnet-1.3b",
    "GLA": "gla-1.3b",
    "Gated DeltaNet": "gated-deltanet-1.3b",
    "Mamba-2": "mamba2-1.3b",
    "Mamba": "mamba-1.4b",
    "attention": "transformer-1.3b",
}
# Of a transition, how many numbers per head: one, one per key channel, or a matrix of them; of Mamba one per state.
TRANSITIONS = {"RetNet": 0, "Mamba-2": 0, "GLA": 1, "Gated DeltaNet": 2}
STATE_BYTES = 4  # of a number in a state; float32
TOKENS, RANKS = 2**20, [2**n for n in range(1, 11)]
MEASURED_TOKENS, MEASURED_RANKS = 256, (2, 4)


def build(name: str) -> Mixer:
    config = ZooConfig.preset(PRESETS[name])
    return config.build_mixer(config.pattern[0])


def messages(name: str, element_size: int) -> Messages:
    """Of one text; `element_size`: bytes of a number in an activation."""
    with torch.device("meta"):
        layer = build(name)
    state = layer.init_state(1)
    if name == "attention":
        return Messages(keys=2 * layer.num_kv_heads * layer.head_size * element_size)
    tail = math.prod(state["conv"].shape) * element_size if "conv" in state else 0
    if "h" in state:
        size = state["h"].numel() * STATE_BYTES
        return Messages(size, size, tail)
    heads, key_size = state["S"].shape[1:3]
    return Messages(state["S"].numel() * STATE_BYTES, heads * key_size ** TRANSITIONS[name] * STATE_BYTES, tail)


def measure(rank: int, size: int, folder: str) -> None:
    """What the busiest of `size` ranks receives for each layer in each form, into `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    rows = []
    for name in PRESETS:
        torch.manual_seed(0)
        layer = build(name)
        x = torch.randn(1, MEASURED_TOKENS, layer.hidden_size)
        for form in FORMS:
            with sequence_parallel(dist.group.WORLD, form) as group:
                layer(group.segment(x)).square().mean().backward()
            busiest = torch.tensor(group.received)
            dist.all_reduce(busiest, dist.ReduceOp.MAX)
            predicted = received(form, size, MEASURED_TOKENS, messages(name, x.element_size()))
            row = {"layer": name, "form": form, "ranks": size, "measured": busiest.item(), "predicted": predicted}
            rows.append(row)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def measured() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in MEASURED_RANKS:
            mp.spawn(measure, args=(size, folder), nprocs=size)
            rows += json.loads(Path(folder, f"{size}.json").read_text())
    return rows


def predicted() -> dict[str, list[int]]:
    """Bytes for each number of ranks, by "layer, form"."""
    lines = {}
    for name in PRESETS:
        sent = messages(name, 2)
        if name == "attention":
            lines["ring attention"] = [received_by_ring_attention(n, TOKENS, sent.keys) for n in RANKS]
            lines["attention, gathered"] = [received("all_gather", n, TOKENS, sent) for n in RANKS]
            continue
        for form in FORMS:
            lines[f"{name}, {form}"] = [received(form, n, TOKENS, sent) for n in RANKS]
    return lines


def table(lines: dict[str, list[int]]) -> str:
    """For a page, in MiB."""
    shown = [2, 8, 64, 256, 1024]
    rows = [["MiB", *(f"{n:,} ranks" for n in shown)], ["---"] + ["---:"] * len(shown)]
    rows += [[name, *(f"{values[RANKS.index(n)] / 2**20:,.1f}" for n in shown)] for name, values in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(lines: dict[str, list[int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colors = {"GLA": "C0", "Gated DeltaNet": "C2", "Mamba": "C1"}  # RetNet and Mamba-2 would lie on the first two
    for name, values in lines.items():
        layer = name.split(",")[0]
        if layer not in colors and "attention" not in layer:
            continue
        color, style = colors.get(layer, "black"), "--" if name.endswith(("ring", "gathered")) else "-"
        axes.plot(RANKS, [value / 2**20 for value in values], style, color=color, linewidth=1.5)
        place = {"ring attention": "bottom", "attention, gathered": "top", "Gated DeltaNet, ring": "bottom"}
        end = RANKS[-1], values[-1] / 2**20
        axes.annotate(name, end, (6, 0), textcoords="offset points", va=place.get(name, "center"), color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(RANKS, [f"{n:,}" for n in RANKS])
    axes.set(xlabel=f"ranks that share a text of {TOKENS:,} tokens")
    axes.set(ylabel="MiB that a rank receives per layer, forward and backward")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lm_zoo.eval.bench_sequence_parallel", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="write what was found to this file, and a plot beside it as .svg")
    arguments = parser.parse_args()
    rows, lines = measured(), predicted()
    print(table(lines))
    for row in rows:
        print(f"{row['layer']}, {row['form']}, {row['ranks']} ranks: {row['measured']:,} of {row['predicted']:,} bytes")
    if arguments.json:
        found = {"torch": torch.__version__, "tokens": TOKENS, "ranks": RANKS, "bytes": lines, "measured": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        draw(lines, arguments.json.with_suffix(".svg"))
    if any(row["measured"] != row["predicted"] for row in rows):
        raise SystemExit("what was measured is not what the formulas say")


if __name__ == "__main__":
    main()
