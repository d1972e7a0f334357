"""The presets on a pretrained transformer: minutes each, where the model and its text are at hand."""

import os
from pathlib import Path

import pytest
from linearize_fixtures import STORIES

from lm_zoo.linearized.window import WINDOWS
from lm_zoo.train.linearize import linearize
from lm_zoo.train.linearize.data import TextOptions

pytestmark = pytest.mark.slow


@pytest.fixture
def stories() -> Path:
    """The folder with a small Llama and stories like those that it was trained on."""
    folder = Path(os.environ.get("LM_ZOO_TEST_DATA", STORIES))
    if not (folder / "stories260k").is_dir():
        pytest.skip(f"no stories260k in {folder}; LM_ZOO_TEST_DATA names another folder")
    return folder


def report_of(stories: Path, tmp_path: Path, preset: str, overrides: dict | None = None) -> dict:
    data = TextOptions(files=(str(stories / "tinystories.txt"),), cache_dir=tmp_path / "cache")
    _, report = linearize(
        stories / "stories260k", preset, data=data, output=tmp_path / "out", overrides=overrides, log=print
    )
    return report


@pytest.mark.parametrize("kind", WINDOWS)
def test_lolcats_closes_most_of_the_gap(stories, tmp_path, kind) -> None:
    window = {"options.window": 16, "options.window_kind": kind}
    assert report_of(stories, tmp_path, "lolcats", window)["gap_closed"] >= 0.6


def test_hedgehog_needs_no_window(stories, tmp_path) -> None:
    report = report_of(stories, tmp_path, "hedgehog")
    assert report["perplexity"].keys() == {
        "teacher", "untrained", "transfer", "recover", "linear_part_ablated", "final",
    }  # fmt: skip
    assert report["times_the_teachers"] <= 2


def test_gated_deltanet_needs_no_window(stories, tmp_path) -> None:
    report = report_of(stories, tmp_path, "gated_deltanet")
    assert report["kept_layers"] == []
    assert "window_only" not in report["perplexity"]
    assert report["times_the_teachers"] <= 1.5


def test_mamba_in_llama_keeps_one_layer_of_four(stories, tmp_path) -> None:
    report = report_of(stories, tmp_path, "mamba_in_llama")
    assert report["kept_layers"] == [3]
    assert report["times_the_teachers"] <= 1.25


def test_liger_is_close_to_the_teacher(stories, tmp_path) -> None:
    assert report_of(stories, tmp_path, "liger")["times_the_teachers"] <= 1.15
