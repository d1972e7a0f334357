"""A small teacher, its tokenizer and a text, for all tests of linearization."""

import functools
import random
from pathlib import Path

import torch
from tiny_teachers import new_teacher

from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.train.linearize.data import LinearizeData, TextOptions
from lm_zoo.train.linearize.spec import LinearizeSpec
from lm_zoo.train.tokenizers import byte_tokenizer

STORIES = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout
WORDS = ["the", "state", "gate", "token", "decay", "key", "value", "chunk", "scan", "of", "in", "forgets", "writes\n"]
STAGE = {"tokens": 10_000, "max_epochs": 100, "length": 32, "batch": 4, "learning_rate": 0.02, "validations": 2}
HYBRID = {"mixer": "hybrid", "options": {"window": 4, "window_kind": "sliding"}}


def stage(steps: int, **options) -> dict:
    """Options of a stage of so many steps."""
    options = STAGE | options
    return options | {"tokens": steps * options["batch"] * options["length"] * options.get("accumulate", 1)}


def small_spec(transfer: dict | int | None = 4, recover: dict | int | None = 4, **options) -> LinearizeSpec:
    """A spec whose stages take a few steps: their number, or their options."""
    stages = {"transfer": transfer, "recover": recover}
    stages = {name: stage(value) if isinstance(value, int) else value for name, value in stages.items()}
    return LinearizeSpec.from_dict(HYBRID | stages | {"measure_tokens": 512} | options)


def documents(count: int = 160, words: int = 30) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(2, words))).strip() for _ in range(count)]


def write_text(path, count: int = 160) -> str:
    path.write_text("\n<|endoftext|>\n".join(documents(count)) + "\n", encoding="utf-8")
    return str(path)


def byte_teacher(family: str = "llama", **changes):
    """A teacher of the bytes' vocabulary."""
    return new_teacher(family, vocab_size=258, **changes)


@functools.cache
def tokenizer():
    return byte_tokenizer()


def small_student(options: dict | None = None, family: str = "llama", mixer: str = "hybrid", keep=()):
    torch.manual_seed(0)
    options = HYBRID["options"] if options is None else options
    return LinearizedForCausalLM.from_teacher(byte_teacher(family), mixer, options, list(keep)).eval()


def load_data(tmp_path, val_fraction: float = 0.2) -> LinearizeData:
    options = TextOptions(files=(write_text(tmp_path / "text.txt"),), cache_dir=tmp_path / "cache")
    return LinearizeData.load(options, tokenizer(), val_fraction)
