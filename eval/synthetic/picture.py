"""The picture of a sweep, from what its results.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_zoo.files import whole_file

MARKERS = "osD^v<>Ph*X"


def draw(content: dict[str, Any], picture: Path) -> None:
    """Accuracy over the length of the tests, over the tests by name, or over the size of the state.

    Medians over the seeds, and all between.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    scale = "linear" if content["against"] == "tests" else "log"
    axes = figure.add_subplot(ylabel="accuracy", ylim=(-0.03, 1.03), xscale=scale)
    curves = by_state(content) if content["against"] == "state" else by_test(content)
    for index, (label, points) in enumerate(curves.items()):
        x, median, worst, best = zip(*sorted(points), strict=True)
        style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        axes.plot(x, median, label=label, linestyle="-" if index < 10 else "--", **style)
        axes.fill_between(x, worst, best, color=style["color"], alpha=0.12, linewidth=0)
    axes.axhline(content["chance"], color="grey", linestyle=":", label="chance")
    if content["against"] == "length":
        axes.set(xlabel="tokens of a test text", xticks=content["lengths"])
        axes.xaxis.set_major_formatter(ScalarFormatter())
    elif content["against"] == "tests":
        names = ["\n".join(name.split(", ", 1)) for name in content["tests"]]
        axes.set_xticks(range(len(names)), labels=names, fontsize="small")
        axes.margins(x=0.15)
    else:
        axes.set_xlabel("state: numbers kept of a text, over all layers")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    with whole_file(picture) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


Point = tuple[float, float, float, float]  # where, and the median, the worst and the best accuracy there


def by_test(content: dict[str, Any]) -> dict[str, list[Point]]:
    """A curve for each row over the tests: over their lengths if they differ in nothing else, or side by side."""
    places = content["lengths"] if content["against"] == "length" else range(len(content["tests"]))
    curves, several = {}, len(content["settings"]["hidden_sizes"]) > 1
    for row in _done(content):
        label = f"{row['mixer']}, d = {row['hidden_size']}" if several else row["mixer"]
        columns = (places, row["accuracy"], row["worst"], row["best"])
        curves[label] = list(zip(*columns, strict=True))
    return curves


def by_state(content: dict[str, Any]) -> dict[str, list[Point]]:
    """A curve for each mixer over its hidden sizes, by the mean over the parts of the test."""
    curves: dict[str, list[Point]] = {}
    for row in _done(content):
        means = (sum(row[key]) / len(row[key]) for key in ("accuracy", "worst", "best"))
        curves.setdefault(row["mixer"], []).append((row["state"], *means))
    return curves


def _done(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["seeds"]]
