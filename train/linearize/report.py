"""The report of a linearization: `report.json`, and `report.html`, one file with its pictures inside."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

NAMES = {
    "teacher": "teacher",
    "window_only": "window only, untrained",
    "untrained": "untrained swap",
    "transfer": "after transfer",
    "replace": "after replacement step {}",
    "recover": "after recovery",
    "linear_part_ablated": "final, linear part ablated",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
blockquote { margin: 0 0 1rem; padding: .5rem 1rem; background: #f4f4f4; white-space: pre-wrap }
pre { background: #f4f4f4; padding: .5rem 1rem; overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def write_report(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(as_html(report), encoding="utf-8")


def as_html(report: dict[str, Any]) -> str:
    title = html.escape(f"{report['teacher']}, linearized")
    continuation = report["continuation"]
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{_summary(report)}</p>",
        "<h2>Perplexity on held-out text</h2>",
        _table((name, f"{value:.3f}") for name, value in _in_order(report["perplexity"])),
        _perplexities(report),
        _errors(report),
        _losses(report),
        "<h2>What it took</h2>",
        _table(_costs(report)),
        "<h2>One prompt, continued by both</h2>",
        *(
            f"<p>{who}</p><blockquote>{html.escape(continuation[key])}</blockquote>"
            for key, who in (("prompt", "Prompt"), ("teacher", "Teacher"), ("student", "Student"))
        ),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(yaml.safe_dump(json.loads(json.dumps(report['spec'])), sort_keys=False))}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines, for a terminal."""
    lines = [f"{name:<28}{value:10.3f}" for name, value in _in_order(report["perplexity"])]
    return [f"perplexity on {report['held_out_tokens']:,} held-out tokens", *lines, _summary(report)]


def _summary(report: dict[str, Any]) -> str:
    closed = report["gap_closed"]
    gap = "of the gap between the window alone and the teacher is closed"
    share = "" if closed is None else f" {closed:.0%} {gap}." if closed > 0 else f" Nothing {gap}."
    replaced = report["layers"] - len(report["kept_layers"])
    return (
        f"{replaced} of {report['layers']} attention layers replaced by {report['spec']['mixer']}; "
        f"perplexity {report['times_the_teachers']:.3f} times the teacher's.{share}"
    )


def _in_order(perplexities: dict[str, float]) -> list[tuple[str, float]]:
    """What was measured, named for a reader, in the order of `NAMES`."""
    named = []
    for kind, name in NAMES.items():
        for key, value in perplexities.items():
            step = key.removeprefix(f"{kind}_")
            if key == kind or step.isdecimal():
                named.append((name.format(step), value))
    return named


def _costs(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for key, stage in report["stages"].items():
        name = key.replace("_", " ")
        yield f"{name}: trained parameters", f"{stage['trained_parameters']:,} of {report['parameters']:,}"
        yield f"{name}: tokens", f"{stage['tokens']:,} in {stage['steps']:,} steps (best: {stage['best_step']:,})"
        yield f"{name}: seconds", f"{stage['seconds']:,.1f}"
    state = report["state"]
    yield "peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    yield "state of a text", f"{state['bytes']:,} bytes, at any length"
    yield "KV cache in its place", f"{state['kv_cache_bytes_per_token']:,} bytes per token"
    if state["smaller_than_the_kv_cache_from"] is not None:
        yield "state is smaller from", f"{state['smaller_than_the_kv_cache_from']:,} tokens on"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (
        f'<tr><td>{html.escape(name)}</td><td class="number">{html.escape(value)}</td></tr>' for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


# ---- pictures ------------------------------------------------------------------------------------------------------


def _perplexities(report: dict[str, Any]) -> str:
    values = _in_order(report["perplexity"])
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(values)), layout="constrained")
    axes = figure.add_subplot(xlabel="perplexity", xscale="log")
    axes.barh(*zip(*values, strict=True), color="C0")
    axes.axvline(report["perplexity"]["teacher"], color="black", linewidth=1, linestyle=":")
    axes.invert_yaxis()
    return _svg(figure)


def _errors(report: dict[str, Any]) -> str:
    errors = report["layer_error"]
    layers = [layer for layer, error in enumerate(errors["before"]) if error is not None]
    if not layers:
        return ""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="||y - y'||² / ||y||²", yscale="log")
    for offset, when in ((-0.2, "before"), (0.2, "after")):
        if errors[when] is not None:
            heights = [errors[when][layer] for layer in layers]
            axes.bar([layer + offset for layer in layers], heights, 0.4, label=f"{when} the transfer")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not on them
    axes.xaxis.get_major_locator().set_params(integer=True)
    return f"<h2>Error of each layer's attention</h2>{_svg(figure)}"


def _losses(report: dict[str, Any]) -> str:
    stages = report["stages"]
    if not stages:
        return ""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for number, (name, stage) in enumerate(stages.items(), start=1):
        axes = figure.add_subplot(1, len(stages), number, xlabel="step", ylabel="loss", title=name.replace("_", " "))
        for key, label in (("training", "training"), ("held_out", "held out")):
            points = [(entry["step"], entry[key]) for entry in stage["history"] if entry[key] is not None]
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3) if points else None
        axes.legend()
    return f"<h2>Training</h2>{_svg(figure)}"


def _svg(figure: Figure) -> str:
    """The picture as an element of the page; without its date, so that equal results give equal files."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
