"""A softmax transformer that the zoo itself has trained can be the teacher."""

import json
import math
from pathlib import Path

import pytest
from linearize_fixtures import tokenizer, write_text

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.cli import main
from lm_zoo.eval.loading import load_model

STAGES = [f"--{stage}-{option}" for stage in ("transfer", "recover") for option in ("tokens=300", "length=32")]


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    tokenizer().save_pretrained("teacher")


def save(mixer: str) -> None:
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2}
    ZooForCausalLM(ZooConfig(**sizes, mixers={mixer: {"num_heads": 2}})).save_pretrained("teacher")


def test_a_transformer_of_the_zoo(capsys) -> None:
    save("attention")
    command = ["linearize", "teacher", "--window=4", *STAGES]
    assert main([*command, "--text", "text.txt", "--output", "out", "--cache-dir", "cache"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert (report["family"], report["teacher"]) == ("llama", "teacher")
    assert math.isfinite(report["perplexity"]["final"])
    student, _ = load_model("out")
    assert student.config.num_hidden_layers == 2
    capsys.readouterr()
    assert main([*command, "--dry-run", "--tflops=1"]) == 0
    assert capsys.readouterr().out.startswith(f"{report['parameters']:,} parameters")


def test_other_models_of_the_zoo_are_refused(capfd) -> None:
    save("gla")
    assert main(["linearize", "teacher", "--text", "text.txt", "--output", "out", "--cache-dir", "cache"]) == 2
    assert capfd.readouterr().err.startswith("lm-zoo: error: a model of the zoo is a transformer only with softmax")
