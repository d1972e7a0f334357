"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lm_zoo.cli import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text()
ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "command", [c for c in commands() if c[0] == "lm-zoo" and c[1] in ("eval", "generate", "list")]
)
def test_commands_parse(command):
    assert build_parser().parse_args(command[1:]).command


def test_recipes_and_scripts_exist():
    for command in commands():
        if command[0] == "bash":
            assert (ROOT / command[1]).is_file()
        if command[:2] == ["lm-zoo", "train"]:
            recipe = ROOT / "configs" / "train" / f"{command[command.index('--config') + 1]}.yaml"
            assert "model" in yaml.safe_load(recipe.read_text())
