"""Reading what a person names on the command line: a text, a folder with a model. Anything amiss is one UserError."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import lm_zoo  # noqa: F401  registers the zoo's own models with the Auto classes
from lm_zoo.errors import UserError, one_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file that exists and holds more than white space."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no text file {path}; check the path")
    text = decode_utf8(path.read_bytes(), str(path))
    if not text.strip():
        raise UserError(f"{path} holds no text; name a file that does")
    return text


def decode_utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error


def load_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal LM that was saved with its tokenizer, on the GPU if there is one, in eval mode.

    On a CPU the weights become float32: half precision there is slow and no more exact. Nothing is ever fetched from
    the network.
    """
    folder = Path(folder)
    check_folder(folder)
    cuda = torch.cuda.is_available()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto" if cuda else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        _check_files(folder)
        raise UserError(f"cannot load the model in {folder}: {one_line(error)}; save it again") from error
    incomplete = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if incomplete:
        raise UserError(
            f"the checkpoint in {folder} lacks {len(incomplete)} weights that its config.json asks for "
            f"(first: {incomplete[0]}); save the model again"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def _check_files(folder: Path) -> None:
    """UserError for the file of weights that cannot be read: the loader's own errors do not say which it is."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is cut off or damaged ({one_line(error)}); fetch or save it again") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model's vocabulary {rows}; "
            "save the model together with the tokenizer that it was trained with"
        )


def check_folder(folder: Path) -> None:
    """Whether it has what a saved model has: a configuration and weights."""
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}; name a folder written by `lm-zoo train` or save_pretrained")
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} has no config.json, so it is not a saved model; name the folder that holds one")
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise UserError(f"{config} is not JSON ({one_line(error)}); save the model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{config} names no model_type, so it is not a model's config; save the model again")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(f"{folder} has no weights ({WEIGHTS[0]}); save the model again")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved model."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{folder} has no tokenizer; put it there with tokenizer.save_pretrained({str(folder)!r})")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise UserError(f"cannot load the tokenizer in {folder}: {one_line(error)}; save it again") from error
