"""`lm-zoo train`: recipes, options, and one line for everything that can be wrong."""

import importlib.resources
import json
from pathlib import Path

import pytest
import yaml

from lm_zoo.cli import main
from lm_zoo.train.cli import TrainCLI, find_configs

RECIPES = sorted((importlib.resources.files("lm_zoo.configs") / "train").iterdir())


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch, make_text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("text.txt").write_text(make_text(6000), encoding="utf-8")


SMALL = [
    "--data.cache_dir", "cache", "--out", "run", "--data.seq_len", "16", "--data.batch_size", "2",
    "--model.config.hidden_size", "16", "--model.config.num_hidden_layers", "1", "--trainer.max_steps", "3",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_instantiates(recipe, recwarn) -> None:
    options = [] if yaml.safe_load(recipe.read_text())["data"].get("dataset") else ["--data.files", "text.txt"]
    cli = TrainCLI([f"--config={recipe}", *options])
    assert cli.model.zoo_config().hidden_size in (128, 1024)
    assert cli.trainer.default_root_dir == f"runs/{recipe.name.removesuffix('.yaml')}"
    assert recipe.read_text().startswith("# ")
    assert not Path("runs").exists()


def test_a_recipe_by_name_trains(capsys) -> None:
    assert main(["train", "--config", "gla-tiny", "--data.files", "text.txt", *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out == "the trained model is in run/model\n"
    assert "3 steps of 32 tokens" in captured.err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["preset"] == "gla-tiny"
    assert config["data"]["batch_size"] == 2
    assert config["resume"] is None
    # What was saved is a recipe itself, and gives the same run.
    assert main(["train", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert (
        Path("again/metrics.csv").read_text().splitlines()[1].split(",")[:4]
        == (Path("run/metrics.csv").read_text().splitlines()[1].split(",")[:4])
    )


def test_lists_of_files_and_a_trained_tokenizer(capsys, make_text) -> None:
    Path("files").mkdir()
    for i in range(200):
        Path(f"files/{i}.py").write_text(make_text(60, i))
    Path("train.list").write_text("".join(f"files/{i}.py\n" for i in range(150)))
    Path("val.list").write_text("".join(f"files/{i}.py\n" for i in range(150, 200)))
    options = ["--data.files", "@train.list", "--data.val_files", "@val.list", "--data.tokenizer", "bpe"]
    assert main(["train", "--config", "gla-tiny", *options, "--data.vocab_size", "300", *SMALL]) == 0
    assert json.loads(Path("run/model/config.json").read_text())["vocab_size"] == 320
    assert sorted(path.name.split("-")[0] for path in Path("cache").iterdir()) == ["bpe", "tokens", "tokens"]


def test_a_prepared_folder_brings_its_tokenizer(capsys) -> None:
    prepare = ["data", "prepare", "--files", "text.txt", "--tokenizer", "bpe", "--vocab-size", "300"]
    assert main([*prepare, "--workers", "1", "--out", "tokens"]) == 0
    assert main(["train", "--config", "gla-tiny", "--data.prepared", "tokens", *SMALL]) == 0
    tokenizers = [Path(folder, "tokenizer.json").read_text() for folder in ("tokens/tokenizer", "run/model")]
    assert tokenizers[0] == tokenizers[1]
    assert main(["train", "--config", "gla-tiny", "--data.prepared", "tokens", "--data.tokenizer", "bytes"]) == 2
    assert "data.tokenizer=bytes is another one; leave data.tokenizer out" in capsys.readouterr().err


def test_help_and_print_config(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: lm-zoo train --config FILE [--any.option value]")
    for option in ("--data.files", "--model.preset", "--resume", "--checkpoint.every_n_steps", "--trainer.precision"):
        assert option in shown
    with pytest.raises(SystemExit):
        main(["train", "--config", "gla-tiny", "--data.files", "text.txt", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["preset"] == "gla-tiny"


def test_names_of_recipes_become_paths() -> None:
    recipe = str(next(recipe for recipe in RECIPES if recipe.name == "gla-tiny.yaml"))
    assert find_configs(["--config", "gla-tiny", "--out", "x"]) == ["--config", recipe, "--out", "x"]
    assert find_configs(["-c=gla-tiny"]) == [f"-c={recipe}"]
    Path("gla-tiny").write_text("out: mine")
    assert find_configs(["--config", "gla-tiny"]) == ["--config", "gla-tiny"]


BAD = {
    "no config file": (["--config", "nope.yaml"], "--config nope.yaml: no such file; give a YAML file, or one of"),
    "no value": (["--config"], "no such file; give a YAML file"),
    "no text": (["--config", "gla-tiny"], "no training text: give --data.files FILE"),
    "no model": (["--data.files", "text.txt"], "no model: give --model.preset"),
    "missing text": (["--config", "gla-tiny", "--data.files", "nope.txt"], "nope.txt does not exist"),
    "empty text": (["--config", "gla-tiny", "--data.files", "empty.txt"], "no text in there; give a file that is not"),
    "short text": (["--config", "gla-tiny", "--data.files", "short.txt"], "has 6 tokens, less than one row"),
    "latin text": (["--config", "gla-tiny", "--data.files", "latin.txt"], "latin.txt: byte 3 is not UTF-8"),
    "broken yaml": (["--config", "broken.yaml"], "Problems parsing config"),
    "binary config": (["--config", "latin.txt"], "--config latin.txt is not text"),
    "unknown option in a file": (["--config", "unknown.yaml"], "does not accept option 'nonsense'"),
    "wrong type in a file": (["--config", "type.yaml"], "trainer.max_steps: expected int, got lots"),
    "list for a mapping": (["--config", "list.yaml"], "model: expected options and their values, got [1, 2]"),
    "unknown option": (["--config", "gla-tiny", "--no.such", "3"], "unrecognized arguments: --no.such 3"),
    "stray word": (["--config", "gla-tiny", "stray"], "unrecognized arguments: stray"),
    "unknown preset": (["--model.preset", "gla-tinny", "--data.files", "text.txt"], "did you mean 'gla-tiny'?"),
    "unknown mixer": (
        ["--model.config", "{mixers: {glaa: {}}}", "--data.files", "text.txt"],
        "no mixer of lm_zoo (did you mean 'gla'?)",
    ),
    "unknown model option": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--model.config.hidden_sizes", "3"],
        "unknown option 'hidden_sizes' for ZooConfig (did you mean 'hidden_size'?)",
    ),
    "wrong type": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--model.learning_rate", "fast"],
        "model.learning_rate: expected float, got fast",
    ),
    "wrong choice": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--model.schedule", "steep"],
        "model.schedule: expected one of 'cosine', 'linear', 'wsd', 'constant', got steep",
    ),
    "impossible value": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--data.batch_size", "0"],
        "data.batch_size=0 is not possible",
    ),
    "no accelerator": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--trainer.accelerator", "warp"],
        "trainer: You selected an invalid accelerator name",
    ),
    "no tokenizer": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--data.tokenizer", "./nowhere"],
        "cannot load the tokenizer './nowhere'",
    ),
    "large tokenizer": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--model.config.vocab_size", "100"],
        "the tokenizer has 258 tokens, more than the model's vocab_size=100",
    ),
    "nothing to resume": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--resume", "last"],
        "run holds no checkpoint to resume from",
    ),
    "resume from text": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--resume", "text.txt"],
        "--resume: text.txt is no checkpoint: it is not a folder",
    ),
    "resume from nothing": (
        ["--config", "gla-tiny", "--data.files", "text.txt", "--resume", "nowhere"],
        "--resume nowhere: no such checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, capfd) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_text("hello")
    Path("latin.txt").write_bytes(b"ok \xff\xfe bad")
    Path("broken.yaml").write_text("model: [1, 2")
    Path("unknown.yaml").write_text("model: {preset: gla-tiny, nonsense: 3}")
    Path("type.yaml").write_text("model: {preset: gla-tiny}\ntrainer: {max_steps: lots}")
    Path("list.yaml").write_text("model: [1, 2]")
    before = {path for path in Path().rglob("*") if "cache" not in path.parts}
    options, message = BAD[case]
    assert main(["train", *options, "--out=run", "--data.cache_dir=cache"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lm-zoo: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert {path for path in Path().rglob("*") if "cache" not in path.parts} == before
