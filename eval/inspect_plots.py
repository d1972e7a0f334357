"""The pictures of `lm-zoo eval inspect`, and of several models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_zoo.eval.inspect_layers import LayerMap
from lm_zoo.eval.lengths import as_perplexity
from lm_zoo.files import whole_file

Content = Mapping[str, Any]
ENDLESS = 1e5  # tokens, at which the memory of what forgets nothing is drawn


def draw_maps(maps: list[LayerMap], picture: Path) -> None:
    """A row for each layer: the mean over its heads, and the heads that look nearest, in the middle and farthest."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = 1 + max(len(seen.heads) for seen in maps)
    figure = Figure(figsize=(2.6 * columns + 0.8, 3 * len(maps) + 0.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    panels = figure.subplots(len(maps), columns, squeeze=False)
    for row, seen in zip(panels, maps, strict=True):
        shown = [(f"layer {seen.layer}, {seen.mixer}\nmean of {len(seen.distance)} {seen.unit}s", seen.mean)]
        shown += [
            (f"{seen.unit} {head}\n{seen.distance[head]:.1f} tokens back", map) for head, map in seen.heads.items()
        ]
        for axes in row[len(shown) :]:
            axes.set_axis_off()
        for axes, (title, weights) in zip(row, shown, strict=False):
            image = axes.imshow(
                weights.numpy(), cmap="viridis", norm=PowerNorm(0.4, vmin=0, vmax=1), interpolation="nearest"
            )
            axes.set_title(title, fontsize=8)
            axes.tick_params(labelsize=7)
        row[0].set_ylabel("token that looks", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("token looked at", fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.4, aspect=30, pad=0.01)
    bar.set_label("share of the token's attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _save(figure, picture)


def draw_memory(rows: list[dict[str, Any]], tokens: int, picture: Path) -> None:
    """Over the depth: the decays of the layers, and how many tokens back they remember and look."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    decaying = [row for row in rows if "decay_quantiles" in row]
    for axes, key in ((above, "decay_quantiles"), (below, "memory_quantiles")):
        for row in decaying:
            low, left, middle, right, high = (ENDLESS if value is None else value for value in row[key])
            axes.vlines(row["layer"], low, high, color="C0", linewidth=1.2)
            axes.vlines(row["layer"], left, right, color="C0", linewidth=5)
            axes.plot(row["layer"], middle, "o", color="white", markeredgecolor="C0", markersize=5)
    above.set_ylabel("decay per token\n(channels: median, 50 %, 90 %)")
    if not decaying:
        above.text(0.5, 0.5, "no layer decays", transform=above.transAxes, ha="center")
    if any(None in row["memory_quantiles"] for row in decaying):
        below.axhline(ENDLESS, color="C0", linestyle="--", linewidth=1, label="forgets nothing")
    layers = [row["layer"] for row in rows]
    distances = [row["attention_distance"] for row in rows]
    spread = [[row["attention_distance"] - row["nearest_head"] for row in rows],
              [row["farthest_head"] - row["attention_distance"] for row in rows]]  # fmt: skip
    offset = [layer + 0.15 for layer in layers]
    below.errorbar(offset, distances, yerr=spread, fmt="s", color="C1", markersize=4, linewidth=1)
    below.axhline((tokens - 1) / 4, color="grey", linestyle=":", linewidth=1)
    below.plot([], [], color="C0", linewidth=5, label="memory: 1 / (1 - decay)")
    below.plot([], [], "s", color="C1", markersize=4, label=f"attention in {tokens} tokens: heads' median, all")
    below.plot([], [], color="grey", linestyle=":", linewidth=1, label="attention to all tokens alike")
    below.set(yscale="log", xlabel="layer", ylabel="tokens back")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    _save(figure, picture)


def draw_positions(models: Mapping[str, Content], picture: Path) -> None:
    """Perplexity of the tokens at each position of a text of 16 training lengths, for one model or several."""
    figure, axes = _over_lengths(models, "position in the text", [1, 4, 16])
    for (name, content), style in zip(models.items(), _styles(), strict=False):
        bins = content["by_position"]
        middle = [(part["first"] + part["last"]) / 2 for part in bins]
        axes.plot(middle, [as_perplexity(part["nats"]) for part in bins], label=name, linewidth=1.2, **style)
    _finish(figure, axes, models, "perplexity at that position", picture)


def draw_lengths(models: Mapping[str, Content], picture: Path) -> None:
    """Perplexity of the same tokens with ever more context, for one model or several."""
    figure, axes = _over_lengths(models, "tokens of the text, the scored ones at its end", [])
    for (name, content), style in zip(models.items(), _styles(), strict=False):
        points = [(point["tokens"], point["perplexity"]) for point in content["by_length"]]
        axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=4, **style)
    _finish(figure, axes, models, "perplexity", picture)


def _over_lengths(models: Mapping[str, Content], xlabel: str, shorter: list[int]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lengths = sorted({point["tokens"] for content in models.values() for point in content["by_length"]})
    figure = Figure(figsize=(8.5 if len(models) > 1 else 7, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, xscale="log")
    axes.set_xticks([*shorter, *lengths])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(lengths[0], color="grey", linestyle=":", linewidth=1)
    axes.text(lengths[0], 0.99, " training length", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    return figure, axes


def _finish(figure, axes, models: Mapping[str, Content], ylabel: str, picture: Path) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_ylabel(ylabel)
    values = [y for line in axes.lines[1:] for y in line.get_ydata()]
    if max(values) > 3 * min(values):  # some models break: the others should still be seen
        axes.set_yscale("log")
    numbers = FuncFormatter(lambda y, _: f"{y:,.4g}")
    axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter(numbers if max(values) < 20 * min(values) else NullFormatter())
    axes.grid(alpha=0.3, which="both")
    if len(models) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, picture)


def _styles() -> list[dict[str, str]]:
    return [{"color": f"C{i}", "linestyle": style} for style in ("-", "--") for i in range(10)]


def _save(figure, picture: Path) -> None:
    with whole_file(picture) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
