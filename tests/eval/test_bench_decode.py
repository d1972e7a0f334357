"""`lm-zoo bench decode`: what it measures of small models, what it leaves out, and says so."""

import json

import pytest
import torch

from lm_zoo.cli import main
from lm_zoo.eval import bench_decode
from lm_zoo.eval.bench_decode import against_transformers, cache_at, crossovers, make_model, state_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_decode, "SIZES", {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2})
    monkeypatch.setattr(bench_decode, "READ", 1000)


def run(tmp_path, *options):
    numbers, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    sizes = ["--mixers", "gla", "attention", "--contexts", "16", "300", "--batches", "1", "2", "--turns", "2"]
    code = main(["bench", "decode", *sizes, "--json", str(numbers), "--plot", str(picture), *options])
    return code, numbers, picture


def test_a_row_for_every_point(tmp_path, capsys):
    code, numbers, picture = run(tmp_path)
    assert code == 0
    report = json.loads(numbers.read_text())
    points = {(m, b, c) for m in ("gla", "attention") for b in (1, 2) for c in (16, 300)}
    for part in ("decoding", "first_token"):
        assert {(row["mixer"], row["batch"], row["context"]) for row in report[part]} == points
    assert report["skipped"] == []
    sizes = {(row["mixer"], row["batch"], row["context"]): row["state_bytes"] for row in report["decoding"]}
    assert sizes["gla", 2, 300] == sizes["gla", 2, 16] == 2 * sizes["gla", 1, 16]
    assert sizes["attention", 2, 300] - sizes["attention", 2, 16] == 2 * 284 * 2 * 2 * 64 * 4  # K and V of 2 layers
    assert all(row["share_of_bandwidth"] > 0 for row in report["decoding"] if row["batch"] == 1)
    assert {row["mixer"] for row in report["crossover"]} == {"gla"}
    assert picture.stat().st_size > 10_000
    assert "| batch 2, tokens/s after | 16 | 300 |" in capsys.readouterr().out


def test_compiled_steps_beside_the_recorded_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_zoo.decode.check_compiler", lambda: None)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    code, numbers, _ = run(tmp_path, "--compile")
    assert code == 0
    report = json.loads(numbers.read_text())
    compiled = {(row["mixer"], row["batch"], row["context"]) for row in report["decoding"] if row.get("compiled")}
    assert compiled == {("gla", batch, context) for batch in (1, 2) for context in (16, 300)}
    assert len(report["decoding"]) == 12
    assert all(row["times_recorded"] > 0 for row in report["decoding"] if row.get("compiled"))
    assert "| gla, compiled |" in capsys.readouterr().out


def test_what_is_too_large_or_too_slow_is_left_out(tmp_path, capsys):
    code, numbers, _ = run(tmp_path, "--gigabytes", "0.0005", "--seconds", "1e-9")
    assert code == 0
    report = json.loads(numbers.read_text())
    left_out = {(point["what"], point["mixer"], point["batch"], point["context"]) for point in report["skipped"]}
    reads = {("first token", mixer, batch, 300) for mixer in ("gla", "attention") for batch in (1, 2)}
    assert left_out == reads | {("decoding", "attention", 2, 300)}
    assert "skipped: decoding, attention, batch 2, context 300: its state of" in capsys.readouterr().out


def test_a_state_that_is_filled_in_is_as_one_that_was_read():
    model = make_model("attention")
    filled, read = cache_at(model, 300, 2), model.init_cache(2)
    with torch.inference_mode():
        model(torch.ones(2, 300, dtype=torch.int64), past_key_values=read)
        for cache in (filled, read):
            assert torch.isfinite(model(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache).logits).all()
    for state, other in zip(filled.states, read.states, strict=True):
        assert torch.equal(state["position"], other["position"])
        assert state.used == other.used == 301
        assert (state["keys"][:, :, :301] != 0).all()
    assert state_bytes(model, 300) == sum(s.trim().nbytes for s in read.states) // 2 - 2 * 2 * 64 * 4


def test_crossovers():
    def row(mixer, context, times):
        return {"mixer": mixer, "batch": 1, "context": context, "times_the_transformer": times}

    rows = [
        row("attention", 8, 1.0),
        row("gla", 8, 0.9),
        row("gla", 64, 1.1),
        row("gla", 512, 3.0),
        row("hgrn", 8, 0.5),
    ]
    assert crossovers(rows) == [
        {"mixer": "gla", "batch": 1, "context": 64},
        {"mixer": "hgrn", "batch": 1, "context": None},
    ]


def test_mamba2_beside_transformers():
    found = against_transformers(2, length=70)
    ours, theirs = found["parameters"]["ours"], found["parameters"]["theirs"]
    assert ours == theirs
    assert all(found[name]["ratio"] > 0 for name in ("decode", "prefill"))


def test_bad_input(tmp_path, capsys):
    assert main(["bench", "decode", "--mixers", "gal"]) == 2
    assert "--mixers has 'gal', which is no mixer of lm_zoo (did you mean 'gla'?)" in capsys.readouterr().err
    assert main(["bench", "decode", "--plot", str(tmp_path / "x.txt")]) == 2
    assert "--plot must end in .png or .svg" in capsys.readouterr().err
    assert main(["bench", "decode", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
