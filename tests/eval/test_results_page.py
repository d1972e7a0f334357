"""docs/results.md says what the files of docs/results say."""

import json
import pathlib

import pytest

from lm_zoo.eval.results_page import COMMAND, results_page

DOCS = pathlib.Path(__file__).parents[2] / "docs"

SWEEP = {
    "kind": "synthetic",
    "task": "parity",
    "title": "Parity",
    "published": "Somebody 2024: 1.",
    "chance": 0.5,
    "tests": ["40 tokens", "256 tokens"],
    "settings": {"hidden_sizes": [64], "model": {}},
    "command": "lm-zoo eval synthetic --task parity --budget cpu",
    "torch": "2.13",
    "device": "a CPU",
    "commit": "abc1234",
    "jobs": 2,
    "minutes": 7.4,
    "run_minutes": 13.0,
    "rows": [
        {"mixer": "gla", "hidden_size": 64, "seeds": 2, "layers": 1, "learning_rate": 0.01, "state": 2048,
         "accuracy": [0.75, 0.5], "worst": [0.7, 0.45], "best": [0.8, 0.55], "steps": [3, 3], "seconds": [20.0, 30.0]},
        {"mixer": "s4d", "hidden_size": 64, "seeds": 0},
    ],
}  # fmt: skip


def test_the_page_is_current():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page == results_page(DOCS / "results"), f"docs/results.md is not current; run: {COMMAND}"


def test_a_sweep_becomes_a_table_with_where_it_comes_from(tmp_path):
    (tmp_path / "synthetic-parity.json").write_text(json.dumps(SWEEP))
    (tmp_path / "synthetic-parity.md").write_text("It drifts.\n")
    (tmp_path / "synthetic-parity.png").write_bytes(b"")
    page = results_page(tmp_path)
    assert "| mixer | layers | state | learning rate | seeds | 40 tokens | 256 tokens |" in page
    assert "| `gla` | 1 | 2,048 | 0.01 | 2 | 0.750 (0.700, 0.800) | 0.500 (0.450, 0.550) |" in page
    assert "| `s4d` | not run | not run | not run | not run | not run | not run |" in page
    assert "| chance |  |  |  |  | 0.500 | 0.500 |" in page
    assert "\nIt drifts.\n" in page
    assert f"`{SWEEP['command']}` at commit abc1234: d = 64; torch 2.13, a CPU, 2 runs side by side" in page
    assert "7 minutes for 13 minutes of runs of 25 s (median)." in page
    assert "\nPublished: Somebody 2024: 1.\n" in page
    assert "![Parity](results/synthetic-parity.png)" in page


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"kind": "guess"}))
    with pytest.raises(ValueError, match=r"x\.json has kind 'guess'; known: synthetic"):
        results_page(tmp_path)
