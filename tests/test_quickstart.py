"""What the quickstart asks for exists, and what it shows of a linearization is what the report says."""

import subprocess
import sys
from pathlib import Path

import pytest

from lm_zoo import ZooConfig
from lm_zoo.linearized import LinearizedConfig
from lm_zoo.llama import llama_config
from lm_zoo.train.linearize import LinearizeSpec

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("quickstart", "quickstart_report", "stdlib_corpus"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import quickstart
    import quickstart_report

    return quickstart, quickstart_report


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--steps", 2)])
def test_it_takes_no_arguments_and_starts_nothing_with_one(argument, code) -> None:
    done = subprocess.run(["bash", SCRIPTS / "quickstart.sh", argument], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert ("bash scripts/quickstart.sh" in done.stdout) == (code == 0)
    assert ("got --steps" in done.stderr) == (code == 2)


def test_the_script_itself_refuses_arguments(scripts, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts[0].main(["--steps", "3"])
    assert "unrecognized arguments: --steps 3" in capsys.readouterr().err


def test_its_transformer_can_be_linearized_as_it_asks(scripts) -> None:
    quickstart, _ = scripts
    spec = LinearizeSpec.load("lolcats").override(quickstart.LINEARIZE)
    assert spec.options["window"] == quickstart.WINDOW
    assert spec.transfer.length == spec.recover.length == quickstart.SEQ_LEN
    teacher = llama_config(ZooConfig.preset(quickstart.MODELS["transformer"][0]))
    LinearizedConfig(teacher_config=teacher.to_dict(), mixer=spec.mixer, mixer_options=spec.options)


def test_the_second_table(scripts) -> None:
    _, quickstart_report = scripts
    report = {
        "perplexity": {"teacher": 80.0, "untrained": 150.04, "window_only": 100.0, "recover": 85.0, "final": 85.0},
        "gap_closed": 0.75,
        "held_out_tokens": 900,
        "spec": {"options": {"window": 4}, "measure_tokens": 1000},
    }
    linearization = quickstart_report.Linearization.of(report)
    assert (linearization.window, linearization.tokens, linearization.gap_closed) == (4, 900, 0.75)
    assert quickstart_report.markdown(["what", "perplexity"], linearization.rows()).splitlines() == [
        "| what | perplexity |",
        "| --- | ---: |",
        "| teacher | 80.0 |",
        "| window only, untrained | 100.0 |",
        "| untrained swap | 150.0 |",
        "| after recovery | 85.0 |",
    ]
