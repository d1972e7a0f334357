"""docs/zoo.md says what the registry says."""

import pathlib

from lm_zoo import MIXERS, ZooConfig
from lm_zoo.cli import main
from lm_zoo.eval.zoo_page import COMMAND, OPS, UNPUBLISHED, ops_of

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "zoo.md"


def test_the_page_is_current(capsys):
    assert main(["list", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), f"docs/zoo.md is not current; run: {COMMAND}"


def test_every_mixer_names_its_op():
    ops = {name: ops_of(mixer(64)) for name, mixer in MIXERS.items()}
    assert all(ops.values()), ops
    assert ops["gla"] == ops["mamba2"] == ["linear_attention"]
    assert (ops["hgrn"], ops["mamba"]) == (["linear_scan"], ["selective_scan"])
    assert {name for names in ops.values() for name in names} == set(OPS.values())


def test_a_mixer_without_a_published_size_says_why():
    sized = set()
    for preset in ZooConfig.presets():
        config = ZooConfig.preset(preset)
        if not preset.endswith("-tiny"):
            sized |= {config.mixers[name].get("type", name) for name in config.pattern}
    assert set(UNPUBLISHED) == set(MIXERS) - sized
