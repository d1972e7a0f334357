"""The script that compares families on long texts goes on where it stopped, and its results have a part of the page."""

import importlib.util
import inspect
import json
from pathlib import Path

import pytest

from lm_zoo.eval.results_page import results_page

SCRIPT = Path(__file__).parents[2] / "scripts" / "extrapolation.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("extrapolation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"length": 8, "batch_size": 2, "steps": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 300}
    monkeypatch.setattr(module, "LENGTH", 8)
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | small)
    return module


def test_models_are_trained_and_measured_once(script, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(inspect)[:20_000])
    results, out = tmp_path / "results" / "lengths.json", tmp_path / "runs"
    script.run(text, text, out, results, ["gla"])
    first = json.loads(results.read_text())["models"]["gla"]
    monkeypatch.setattr(script, "measure", lambda name, *_: {**first, "parameters": 7} if name == "mamba2" else None)
    script.run(text, text, out, results, ["gla", "mamba2"])
    content = json.loads(results.read_text())
    assert content["models"] == {"gla": first, "mamba2": {**first, "parameters": 7}}
    assert [point["tokens"] for point in first["by_length"]] == [8, 16, 32, 64, 128]
    assert capsys.readouterr().out.count("\n") == 3
    for name in ("lengths.png", "lengths-positions.png"):
        assert results.with_name(name).read_bytes().startswith(b"\x89PNG")
    content["models"]["gla"] = {**first, "by_position": [{"first": a, "last": b, "nats": 0.0} for a, b in RANGES]}
    content["models"]["mamba2"]["by_position"] = content["models"]["gla"]["by_position"]
    results.write_text(json.dumps(content))
    page = results_page(results.parent)
    perplexities = " | ".join(f"{point['perplexity']:.2f}" for point in first["by_length"])
    assert f"| `gla` | {first['parameters']:,} | {perplexities} |" in page
    assert page.count("| 1.0 | 1.0 | 1.0 | 1.0 |") == 2
    assert "(results/lengths-positions.png)" in page


RANGES = ((1, 15), (16, 127), (128, 1023), (1024, 2047))


def test_no_path_of_a_machine_is_in_the_command(script, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text " * 400)
    results = tmp_path / "lengths.json"
    row = {
        "by_length": [{"tokens": 8, "perplexity": 2.0}],
        "by_position": [{"first": 1, "last": 2, "nats": 1.0}],
        "training_seconds": 6,
    }
    results.write_text(json.dumps({"models": {"gla": row}}))
    script.run(text, text, tmp_path, results, ["gla"])
    content = json.loads(results.read_text())
    assert str(tmp_path) not in content["command"]
    assert content["minutes"] == pytest.approx(0.1)
