"""Draws what `lm_zoo.eval.bench_gpu` found: `python scripts/plot_gpu.py docs/gpu/NAME.json` writes docs/gpu/NAME.png.

Left, milliseconds of forward and backward over the length of the text at a constant number of tokens; right, how many
times as fast as flash-linear-attention each op is at each shape.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TRAINING = "forward + backward"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/plot_gpu.py docs/gpu/NAME.json")
    path = Path(sys.argv[1])
    found = json.loads(path.read_text())
    figure, (lengths, ratios) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rows = [row for row in found["lengths"] if row["direction"] == TRAINING]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        style = {"color": "black", "linestyle": "--"} if op == "flash attention" else {}
        lengths.plot([row["shape"][1] for row in mine], [row["milliseconds"] for row in mine], label=op, **style)
    lengths.set(xscale="log", yscale="log", xlabel="tokens of one text, 131,072 in all", ylabel=f"ms, {TRAINING}")
    lengths.legend()

    rows = [row for row in found["shapes"] if row["direction"] == TRAINING and row["rival_milliseconds"]]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        shapes = ["x".join(map(str, row["shape"])) for row in mine]
        ratios.plot(shapes, [row["rival_milliseconds"] / row["milliseconds"] for row in mine], "o", label=op)
    ratios.axhline(1, color="black", linewidth=1)
    ratios.set(ylabel=f"times as fast as fla, {TRAINING}", xlabel="B x T x H x D")
    ratios.tick_params("x", rotation=30)
    if rows:
        ratios.legend()
    figure.suptitle(f"{found['device']}, torch {found['versions']['torch']}, triton {found['versions']['triton']}")
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
