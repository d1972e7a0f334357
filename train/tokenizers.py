"""Tokenizers: raw bytes, a byte-pair encoding trained on the data, or any Hugging Face one by name or folder.

Every one of them is a `PreTrainedTokenizerFast`, so `save_pretrained` puts it beside the model and `AutoTokenizer`
loads it without this package. Both of our own work on bytes, so any text comes back
from `decode(encode(text))` unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lm_zoo.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIALS = [END_OF_TEXT, PAD]
SMALLEST_BPE = 256 + len(SPECIALS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """UTF-8 bytes as tokens: id = byte for 0..255, then the end-of-text token 256 and the padding token 257."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return _as_hugging_face(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding (Sennrich et al. 2016, as in GPT-2) of at most `vocab_size` tokens.

    `vocab_size` counts the 256 bytes and the two special tokens. A text too small to fill it gives fewer tokens.
    """
    if vocab_size < SMALLEST_BPE:
        raise UserError(f"vocab_size={vocab_size} is too small for a trained tokenizer; give at least {SMALLEST_BPE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=progress
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_hugging_face(tokenizer)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """`"bytes"`, or a Hugging Face tokenizer by hub name or folder. UserError if it cannot be loaded or used."""
    if str(name) == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load the tokenizer {str(name)!r} ({reason}); "
            "give 'bytes', 'bpe', a folder that holds tokenizer.json, or a name on the Hugging Face hub"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {str(name)!r} has no fast version; choose one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {str(name)!r} has no end-of-text token, which ends documents; choose another")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The smallest vocabulary a model needs: one more than the largest id (ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def _as_hugging_face(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
