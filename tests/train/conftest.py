"""A small text, a small model and a small run, for all tests of training."""

import random
from pathlib import Path

import lightning as L
import pytest

from lm_zoo.train import Checkpoints, TextData, ZooModule, fit

WORDS = ["the", "state", "gate", "token", "decay", "key", "value", "chunk", "scan", "of", "in", "forgets", "writes\n"]


@pytest.fixture
def tiny() -> dict:
    """Options of a model with two thousand parameters or so."""
    return {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "mixers": {"gla": {"num_heads": 1, "gate_rank": 4}},
    }


@pytest.fixture
def make_text():
    """Words in random order, with characters of two, three and four bytes among them."""

    def make(words: int, seed: int = 0) -> str:
        generator = random.Random(seed)
        return " ".join(generator.choice([*WORDS, "é", "态", "🙂"]) for _ in range(words))

    return make


@pytest.fixture
def text_file(tmp_path: Path, make_text) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


@pytest.fixture
def start_run(tmp_path: Path, text_file: Path, tiny: dict):
    """Calls `fit` for a tiny model on the text, with the same initial weights every time."""

    def start(out: str, *, data: dict | None = None, model: dict | None = None, checkpoints=None, **options):
        L.seed_everything(0, verbose=False)
        module = ZooModule(**{"config": tiny, "warmup": 0.2, **(model or {})})
        text = TextData(
            **{"files": str(text_file), "seq_len": 16, "batch_size": 2, "val_fraction": 0, **(data or {})},
            cache_dir=str(tmp_path / "cache"),
        )
        options = {
            "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1, **options,
        }  # fmt: skip
        checkpoints = checkpoints or Checkpoints(every_n_steps=1000)
        trainer = fit(module, text, tmp_path / out, checkpoints=checkpoints, **options)
        return trainer, module

    return start
