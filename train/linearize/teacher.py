"""The model that is linearized, by folder or by name."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError, one_line
from lm_zoo.eval.loading import check_folder, load_model, load_tokenizer
from lm_zoo.linearized.families import check_teacher, family_of
from lm_zoo.llama import as_llama, llama_config
from lm_zoo.model import ZooForCausalLM

STREAMED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a repository: no weights in other formats
BROKEN = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


def load_config(name: str | Path) -> PreTrainedConfig:
    """Its configuration alone; UserError where it is of no family that can be linearized."""
    try:
        config = AutoConfig.from_pretrained(name)
    except BROKEN as error:
        raise UserError(f"cannot read the configuration of the teacher {str(name)!r}: {one_line(error)}") from error
    if isinstance(config, ZooConfig):
        config = llama_config(config)
    family_of(config)
    return config


def load_teacher(
    teacher: str | Path | PreTrainedModel, tokenizer: Tokenizer | None
) -> tuple[PreTrainedModel, Tokenizer]:
    """The teacher, ready to be linearized, and its tokenizer."""
    if isinstance(teacher, PreTrainedModel):
        if tokenizer is None:
            raise UserError("the teacher is a model, so its tokenizer has to be given as well")
    elif isinstance(teacher, str | Path):
        loaded = _load(teacher)
        teacher, tokenizer = loaded[0], tokenizer or loaded[1]
    if isinstance(teacher, ZooForCausalLM):
        teacher = as_llama(teacher)
    check_teacher(teacher)
    return teacher.eval(), tokenizer


def find_teacher(teacher: str | Path | PreTrainedModel, tokenizer: Tokenizer | None) -> tuple[Path, Tokenizer]:
    """The folder of a teacher whose weights are to stay on the disk, and its tokenizer; from the hub, fetched first."""
    if isinstance(teacher, PreTrainedModel):
        raise UserError("the teacher is in memory already; mode stream takes one by its folder or name")
    _check_name(teacher)
    folder = Path(teacher)
    if not folder.is_dir():
        load_config(teacher)
        try:
            folder = Path(snapshot_download(str(teacher), allow_patterns=STREAMED))
        except (*BROKEN, HfHubHTTPError) as error:
            raise UserError(f"cannot fetch the teacher {str(teacher)!r}: {one_line(error)}") from error
    check_folder(folder)
    load_config(folder)
    if isinstance(AutoConfig.from_pretrained(folder), ZooConfig):
        raise UserError(f"{folder} is a transformer of the zoo, and no teacher for mode stream; leave the mode out")
    return folder, tokenizer or load_tokenizer(folder)


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions the teacher knows, where it says so."""
    return getattr(config, "max_position_embeddings", None)


def not_finite(name: str) -> UserError:
    """What to say of a teacher whose predictions are NaN: all that is measured or learned of it would be so, too."""
    return UserError(
        f"the teacher {name} predicts NaN or infinity: some of its weights are not finite, or too large for its dtype; "
        "fetch or save it again"
    )


def _load(name: str | Path) -> tuple[PreTrainedModel, Tokenizer]:
    if Path(name).is_dir():
        if (Path(name) / "config.json").is_file():
            load_config(name)  # an unsupported family is told before its weights are read
        return load_model(name)
    _check_name(name)
    load_config(name)
    cuda = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if cuda else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except BROKEN as error:
        raise UserError(f"cannot load the teacher {str(name)!r}: {one_line(error)}") from error
    return model.to("cuda" if cuda else "cpu"), tokenizer


def _check_name(name: str | Path) -> None:
    if not Path(name).is_dir() and (Path(name).is_absolute() or str(name).startswith(".")):
        raise UserError(f"no model folder {name}; check the path")
