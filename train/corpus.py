"""A corpus on disk: every document tokenised once, into Arrow files that are memory-mapped from then on.

A cache folder is named by a hash of all that its content depends on (files with size and time, tokenizer, options). It
is written under a temporary name and renamed when whole, so there is never half a cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import multiprocess
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lm_zoo.files import whole_folder
from lm_zoo.train.sources import ROWS_PER_BATCH, Source
from lm_zoo.train.tokenizers import vocabulary_size

Encode = Callable[[dict[str, list]], dict[str, list]]

FORMAT = 1  # raise it when the columns below change: older caches are then made anew


def features(tokenizer: PreTrainedTokenizerBase) -> datasets.Features:
    """The columns; a row is a piece of text, and a document's last piece ends with the end-of-text token.

    `key` is a hash of the text in [0, 2^63); the one of its first piece stands for a document.
    """
    return datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("uint16" if vocabulary_size(tokenizer) <= 2**16 else "int32")),
            "num_bytes": datasets.Value("int64"),
            "starts_document": datasets.Value("bool"),
            "key": datasets.Value("int64"),
        }
    )


def tokenise(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    max_tokens: int | None = None,
    num_proc: int | None = None,
) -> Path:
    """Tokenises `source` unless the cache holds it, and returns the folder of its Arrow files."""
    streaming = getattr(source, "streaming", False)
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    parts = [FORMAT, source.identity(), vocabulary, tokenizer.eos_token_id, max_tokens if streaming else None]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    folder = cache_dir / f"tokens-{key}"
    if folder.is_dir():
        return folder
    encode = functools.partial(_encode, source=source, tokenizer=tokenizer)
    with whole_folder(folder) as unfinished, _progress_bar():
        rows = source.rows(scratch := unfinished / "rows")
        if isinstance(rows, datasets.IterableDataset):
            schema = features(tokenizer).arrow_schema
            _write_stream(rows.iter(ROWS_PER_BATCH), encode, schema, unfinished, max_tokens)
        else:
            _write_all(rows, encode, features(tokenizer), unfinished, num_proc)
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


class Corpus:
    """The tokens of a folder that `tokenise` made, as one long sequence that is read from disk when it is indexed.

    Attributes, one entry per piece of text:
        starts, lengths: where its tokens lie in the sequence.
        num_bytes: its length as UTF-8.
        starts_document: whether a document begins with it.
        keys: the hash of its document.
    """

    def __init__(self, folder: Path) -> None:
        chunks = [chunk for file in sorted(folder.glob("*.arrow")) for chunk in _record_batches(file)]
        column = functools.partial(_column, chunks)
        lists = [chunk["input_ids"] for chunk in chunks]
        self._tokens = [tokens.flatten().to_numpy() for tokens in lists]
        self._chunk_starts = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        self.lengths = np.concatenate([np.diff(tokens.offsets.to_numpy()) for tokens in lists]).astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_bytes = column("num_bytes")
        self.starts_document = column("starts_document")
        first = np.maximum.accumulate(np.where(self.starts_document, np.arange(len(self.lengths)), 0))
        self.keys = column("key")[first]

    def __len__(self) -> int:
        return int(self._chunk_starts[-1])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from position `start`, which must lie within one piece. A view, not a copy."""
        chunk = int(np.searchsorted(self._chunk_starts, start, side="right")) - 1
        start -= int(self._chunk_starts[chunk])
        return self._tokens[chunk][start : start + length]


def _encode(rows: dict[str, list], *, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    pieces = list(source.pieces(rows))
    texts = [piece.text for piece in pieces]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    raw = [text.encode() for text in texts]
    end_of_text = [tokenizer.eos_token_id]
    return {
        "input_ids": [
            np.array(encoding.ids + (end_of_text if piece.ends_document else []))
            for encoding, piece in zip(encodings, pieces, strict=True)
        ],
        "num_bytes": [len(text) for text in raw],
        "starts_document": [piece.starts_document for piece in pieces],
        "key": [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1 for text in raw],
    }


def _write_all(
    rows: datasets.Dataset,
    encode: Encode,
    columns: datasets.Features,
    folder: Path,
    num_proc: int | None,
) -> None:
    try:
        with _one_level_of_parallelism(num_proc):
            rows.map(
                encode,
                batched=True,
                batch_size=ROWS_PER_BATCH,
                remove_columns=rows.column_names,
                features=columns,
                num_proc=num_proc,
                cache_file_name=str(folder / "tokens.arrow"),
                new_fingerprint="tokens",  # any name will do: the file is given
                desc="Tokenising",
            )
    except multiprocess.TimeoutError as error:  # how `datasets` ends when Ctrl-C stops it waiting for its workers
        raise KeyboardInterrupt from error


def _write_stream(
    batches: Iterator[dict], encode: Encode, schema: pa.Schema, folder: Path, max_tokens: int | None
) -> None:
    count = 0
    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for rows in datasets.utils.tqdm(batches, desc="Tokenising", unit=" batches"):
            encoded = encode(rows)
            writer.write_batch(pa.RecordBatch.from_pydict(encoded, schema=schema))
            count += sum(len(ids) for ids in encoded["input_ids"])
            if max_tokens is not None and count >= max_tokens:
                break


def _record_batches(file: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(str(file)) as mapped:
        return [batch for batch in pa.ipc.open_stream(mapped) if batch.num_rows]


def _column(chunks: list[pa.RecordBatch], name: str) -> np.ndarray:
    return np.concatenate([chunk[name].to_numpy(zero_copy_only=False) for chunk in chunks])


@contextlib.contextmanager
def _one_level_of_parallelism(num_proc: int | None) -> Iterator[None]:
    """The tokenizer's own threads fill the machine when one process maps; with several processes they must be off."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = "false" if (num_proc or 1) > 1 else "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _progress_bar() -> Iterator[None]:
    """`datasets` draws its bar on a terminal only: in a log file it would be hundreds of lines."""
    enabled = datasets.utils.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.utils.enable_progress_bars()
