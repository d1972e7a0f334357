"""What docs/linearize.md tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from lm_zoo.cli import build_parser as zoo_parser
from lm_zoo.train.linearize.cli import build_parser
from lm_zoo.train.linearize.spec import presets

PAGE = (Path(__file__).parents[1] / "docs" / "linearize.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash") + blocks("console")).splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith(("lm-zoo", "$ lm-zoo"))]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command) -> None:
    if command[1] == "linearize":
        assert build_parser().parse_args(command[2:]).teacher
    else:
        assert zoo_parser().parse_args(command[1:]).command


def test_every_option_is_there() -> None:
    options = {name for action in build_parser()._actions for name in action.option_strings if name.startswith("--")}
    missing = {name for name in options - {"--help"} if not re.search(rf"{name}\b", PAGE)}
    assert not missing


def test_every_preset_is_there() -> None:
    assert [name for name in presets() if f"| `{name}` (" not in PAGE] == []


def test_python_runs_but_for_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code.split("student, report")[0], "linearize.md", "exec"), {})
