"""The benchmark of training runs, on a CPU and small: its numbers are only worth something on a GPU."""

import json

import pytest

from lm_zoo.eval import bench_training


@pytest.fixture
def command(monkeypatch):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(bench_training, "VOCABULARY", 128)
        small = ("--hidden-size", "48", "--layers", "1", "--tokens", "64", "--steps", "2")
        monkeypatch.setattr("sys.argv", ["bench_training", *small, *arguments])
        bench_training.main()

    return run


def test_every_mixer_learns_at_every_length(command, tmp_path):
    command("--lengths", "32", "64", "--json", str(tmp_path / "found.json"))
    rows = json.loads((tmp_path / "found.json").read_text())["training"]
    assert [(row["mixer"], row["length"]) for row in rows] == [
        (mixer, length) for mixer in bench_training.MIXERS for length in (32, 64)
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 0 < row["utilisation"] < 1
        assert row["last_loss"] < row["first_loss"]


def test_lengths_have_to_divide_the_tokens(command, capsys):
    with pytest.raises(SystemExit):
        command("--lengths", "33")
    assert "--lengths must divide --tokens 64" in capsys.readouterr().err
