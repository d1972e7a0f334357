"""The tokenizer that an option names, trained on the text if it says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lm_zoo.files import whole_folder
from lm_zoo.train.sources import Source
from lm_zoo.train.tokenizers import load_tokenizer, train_bpe

BPE_SAMPLE_BYTES = 2**28  # a tokenizer that is trained sees at most the first 256 MB of the training text


def text_tokenizer(name: str, source: Source, vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """`"bpe"`: of `vocab_size` tokens, trained on `source` unless the cache holds it. Else as `load_tokenizer`."""
    if name != "bpe":
        return load_tokenizer(name)
    identity = json.dumps([source.identity(), vocab_size, BPE_SAMPLE_BYTES])
    folder = cache_dir / f"bpe-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    if not folder.is_dir():
        with whole_folder(folder) as unfinished:
            train_bpe(_sample(source), vocab_size).save_pretrained(unfinished)
    return AutoTokenizer.from_pretrained(folder)


def _sample(source: Source) -> Iterator[str]:
    """The first texts of a source, BPE_SAMPLE_BYTES of them."""
    left = BPE_SAMPLE_BYTES
    for rows in source.shards():
        for piece in source.pieces(rows):
            yield piece.text
            left -= len(piece.text)
            if left <= 0:
                return
