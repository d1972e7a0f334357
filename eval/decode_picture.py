"""The picture of `lm-zoo bench decode`: speed, time to the first token and memory over the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_zoo.files import whole_file

SHOWN = {"gla": "C0", "gated_deltanet": "C2", "mamba2": "C1", "hgrn": "C4", "attention": "black"}


def draw_decoding(report: dict[str, Any], picture: Path) -> None:
    """A column for each batch size; all mixers in grey, some of them in colour."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    batches = sorted({row["batch"] for row in report["decoding"]})
    figure = Figure(figsize=(4.2 * len(batches) + 0.6, 9), layout="constrained")
    panels = figure.subplots(3, len(batches), squeeze=False, sharex=True, sharey="row")
    kinds = (
        ("decoding", "tokens_per_second", "decoding, tokens/s of the batch"),
        ("first_token", "seconds", "seconds to the first token"),
        ("decoding", "state_bytes", "state of the batch, MiB"),
    )
    for line, (part, key, label) in zip(panels, kinds, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            rows = [row for row in report[part] if row["batch"] == batch and "compiled" not in row]
            for mixer in dict.fromkeys(row["mixer"] for row in rows):
                mine = [
                    (r["context"], r[key] / (2**20 if key == "state_bytes" else 1)) for r in rows if r["mixer"] == mixer
                ]
                shown = mixer in SHOWN
                axes.plot(
                    *zip(*sorted(mine), strict=True),
                    "o-",
                    markersize=3,
                    linewidth=1.6 if shown else 0.8,
                    color=SHOWN.get(mixer, "0.8"),
                    zorder=3 if shown else 1,
                    label=mixer if shown else None,
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(lambda value, _: f"{value:,g}" if f"{value:.0e}"[0] in "15" else "")
        line[0].set_ylabel(label)
    contexts = sorted({row["context"] for row in report["decoding"]})
    for axes, batch in zip(panels[0], batches, strict=True):
        axes.set_title(f"batch {batch}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel("context, tokens")
    panels[0][0].legend(frameon=False, fontsize=8)
    with whole_file(picture) as unfinished:
        figure.savefig(unfinished, format=picture.suffix.removeprefix(".") or "png", dpi=110)
