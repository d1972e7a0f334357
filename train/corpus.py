"""A corpus on disk: every document tokenised once, into Arrow files that are memory-mapped from then on.

A cache folder is named by a hash of all that its content depends on (files with size and time, tokenizer, options).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lm_zoo.train.prepare import FORMAT, identity_of, is_prepared, prepare
from lm_zoo.train.sources import Source

RELEASE_BYTES = 2**28
PAGES_PER_READ = 2**16  # the system maps this much around a page that is touched


def tokenise(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    max_tokens: int | None = None,
    num_proc: int | None = None,
) -> Path:
    """Tokenises `source` unless the cache holds it, and returns the folder of its Arrow files.

    Killed half-way, it goes on where it was; what it cannot read leaves nothing behind.
    """
    max_tokens = max_tokens if getattr(source, "streaming", False) else None
    parts = [FORMAT, identity_of(source, tokenizer, max_tokens)]
    folder = cache_dir / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"
    if is_prepared(folder):
        return folder
    is_new = not cache_dir.exists()
    try:
        prepare(source, tokenizer, folder, workers=num_proc, max_tokens=max_tokens)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                cache_dir.rmdir()
        raise
    return folder


class Corpus:
    """The tokens of a folder that `prepare` made, as one long sequence that is read from disk when it is indexed.

    In memory are 25 bytes per piece of about 4 kB of text. What was read of the files is given back to the system every
    RELEASE_BYTES, so a process does not grow with the corpus.

    Attributes, one entry per piece of text:
        starts, lengths: where its tokens lie in the sequence.
        num_bytes: its length as UTF-8.
        starts_document: whether a document begins with it.
        keys: the hash of its document.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._maps, self._read = folder, [], 0
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("lengths", "num_bytes", "starts_document", "key")}
        self._tokens: list[np.ndarray] = []
        for file in sorted(folder.glob("*.arrow")):
            for batch in self._batches(file):
                tokens = batch["input_ids"]
                self._tokens.append(tokens.flatten().to_numpy())
                columns["lengths"].append(np.diff(tokens.offsets.to_numpy()))
                columns["num_bytes"].append(batch["num_bytes"].to_numpy().astype(np.int32))
                for name in ("starts_document", "key"):
                    columns[name].append(batch[name].to_numpy(zero_copy_only=False).copy())
            self._release()
        self._chunk_starts = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        self.lengths, self.num_bytes, self.starts_document, keys = map(np.concatenate, columns.values())
        self.starts = np.cumsum(self.lengths) - self.lengths
        first = np.maximum.accumulate(np.where(self.starts_document, np.arange(len(self.lengths)), 0))
        self.keys = keys[first]

    def __reduce__(self) -> tuple:
        return Corpus, (self.folder,)  # a process that is handed one opens the files itself

    def __len__(self) -> int:
        return int(self._chunk_starts[-1])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from position `start`, which must lie within one piece. A view, not a copy."""
        chunk = int(np.searchsorted(self._chunk_starts, start, side="right")) - 1
        start -= int(self._chunk_starts[chunk])
        self._read += PAGES_PER_READ + self._tokens[chunk].itemsize * length
        if self._read >= RELEASE_BYTES:
            self._release()
        return self._tokens[chunk][start : start + length]

    def _batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        with file.open("rb") as stream:
            self._maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        return (batch for batch in pa.ipc.open_stream(pa.py_buffer(self._maps[-1])) if batch.num_rows)

    def _release(self) -> None:
        """Views stay valid: a page that is looked at again is mapped again."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
        self._read = 0
