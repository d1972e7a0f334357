"""Text into tokens at size: on all cores, in little memory, and a kill costs no more than the shards under way.

The folder holds `shard-00000.arrow` and so on, the tokenizer, and a manifest that is written last. Until then there is
`plan.json`, which says what is being tokenised, and a `shard-00000.json` beside each finished shard. A shard depends on
the text, the tokenizer and the options alone: the bytes are the same however often the work was interrupted, and by
however many processes it was done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lm_zoo.errors import UserError
from lm_zoo.files import remove_unfinished, whole_file, whole_folder
from lm_zoo.train.snapshot import checksum
from lm_zoo.train.sources import ROWS_PER_BATCH, Piece, Source
from lm_zoo.train.tokenizers import load_tokenizer, vocabulary_size
from lm_zoo.train.workers import in_order

FORMAT = 2  # raise it when the columns below change: older folders are then made anew
MANIFEST, PLAN, TOKENIZER = "manifest.json", "plan.json", "tokenizer"


@dataclass(frozen=True)
class Counts:
    """Of a shard, or of a corpus."""

    tokens: int = 0  # end-of-text tokens included
    documents: int = 0
    pieces: int = 0
    text_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


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


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which tokens a text becomes."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identity_of(source: Source, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> dict[str, Any]:
    """What the tokens depend on, as JSON gives it back."""
    parts = {"text": source.identity(), "tokenizer": tokenizer_hash(tokenizer), "max_tokens": max_tokens}
    return json.loads(json.dumps({"format": FORMAT, **parts}))


def is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    workers: int | None = None,
    max_tokens: int | None = None,
) -> Counts:
    """Tokenises `source` into `folder`, or goes on with it where it was interrupted.

    Args:
        workers: processes; by default one per core.
        max_tokens: stop at the shard with so many tokens, and within it at the next batch of pieces.

    UserError where the folder holds something else, or the text cannot be read.
    """
    identity = identity_of(source, tokenizer, max_tokens)
    if is_prepared(folder):
        manifest = read_manifest(folder)
        _check_same(folder, manifest["identity"], identity)
        return Counts(**manifest["counts"])
    _start(folder, identity, tokenizer)
    done = {name: json.loads((folder / f"{name}.json").read_text()) for name in _finished(folder)}
    encode = functools.partial(_write_shard, source=source, tokenizer=tokenizer, folder=folder, limit=max_tokens)
    names = (f"shard-{i:05d}" for i in range(10**5))
    tasks = ((name, None if name in done else shard) for name, shard in zip(names, source.shards(), strict=False))
    counts, files = Counts(), {}
    with _progress_bar() as bar, contextlib.closing(in_order(encode, tasks, done, workers)) as results:
        for name, result in results:
            counts += Counts(**result["counts"])
            files[f"{name}.arrow"] = result["file"]
            bar.update(result["counts"]["text_bytes"])
            if max_tokens is not None and counts.tokens >= max_tokens:
                break
    if counts.pieces == 0:
        shutil.rmtree(folder)
        raise UserError(f"{source.what()}: no text in there; give a file that is not empty")
    _finish(folder, {"identity": identity, "counts": asdict(counts), "files": files})
    return counts


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. UserError unless the folder's files are those that it names."""
    if not (folder / MANIFEST).is_file():
        half = (folder / PLAN).is_file()
        remedy = "run the same `lm-zoo data prepare` again" if half else "make one with `lm-zoo data prepare`"
        raise UserError(f"{folder} is {'only half prepared' if half else 'no folder of prepared text'}; {remedy}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["identity"]["format"] != FORMAT:
            raise UserError(f"{folder} is of another version of this package; prepare the text anew")
        files, _ = manifest["files"], Counts(**manifest["counts"])
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / MANIFEST} is damaged; prepare the text anew") from error
    found = {path.name: path.stat().st_size for path in folder.glob("*.arrow")}
    for name in sorted(sizes.keys() | found.keys()):
        if sizes.get(name) != found.get(name):
            expected, there = (
                f"{n:,} bytes" if n is not None else "not there" for n in (sizes.get(name), found.get(name))
            )
            raise UserError(
                f"{folder} does not match its {MANIFEST}: {name} is {there}, expected {expected}; prepare anew"
            )
    return manifest


def prepared_tokenizer(folder: Path, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that a prepared folder was made with. UserError if `name`, where it is given, is another one."""
    expected = read_manifest(folder)["identity"]["tokenizer"]
    tokenizer = load_tokenizer(folder / TOKENIZER if name is None else name)
    if tokenizer_hash(tokenizer) != expected:
        which = f"{folder / TOKENIZER} has changed since" if name is None else f"data.tokenizer={name} is another one"
        raise UserError(
            f"{folder} was prepared with a tokenizer of its own, and {which}; "
            + (
                "prepare the text anew"
                if name is None
                else "leave data.tokenizer out (null), or prepare the text with it"
            )
        )
    return tokenizer


def _start(folder: Path, identity: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    plan = folder / PLAN
    if plan.is_file():
        _check_same(folder, json.loads(plan.read_text(encoding="utf-8")), identity)
        remove_unfinished(folder)
        return
    if folder.is_dir() and any(path.name[0] != "." and path.name != TOKENIZER for path in folder.iterdir()):
        raise UserError(f"{folder} holds something else; choose another --out, or empty it")
    if not (folder / TOKENIZER).is_dir():
        with whole_folder(folder / TOKENIZER) as unfinished:
            tokenizer.save_pretrained(unfinished)
    _write_json(plan, identity)


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    what = {"text": "other text", "tokenizer": "another tokenizer", "max_tokens": "another number of tokens"}
    for name, described in what.items():
        if before.get(name) != now[name]:
            raise UserError(f"{folder} was begun with {described}; choose another --out, or remove it")


def _finished(folder: Path) -> Iterator[str]:
    """The shards that are whole."""
    for note in sorted(folder.glob("shard-*.json")):
        shard = note.with_suffix(".arrow")
        if shard.is_file() and checksum(shard) == json.loads(note.read_text(encoding="utf-8"))["file"]:
            yield note.stem


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    for path in folder.glob("shard-*"):
        if path.suffix == ".arrow" and path.name not in manifest["files"]:
            path.unlink()  # beyond max_tokens
    _write_json(folder / MANIFEST, manifest)
    for path in [*folder.glob("shard-*.json"), folder / PLAN]:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_shard(
    name: str,
    rows: dict[str, list],
    *,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    limit: int | None,
) -> dict[str, Any]:
    """Tokenises one shard; its counts and its file's checksum are the result, and stand in the note beside it."""
    schema = features(tokenizer).arrow_schema
    counts, pieces = Counts(), source.pieces(rows)
    with whole_file(folder / f"{name}.arrow") as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while (limit is None or counts.tokens < limit) and (batch := list(islice(pieces, ROWS_PER_BATCH))):
                columns = _encode(batch, tokenizer, schema.field("input_ids").type)
                writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
                documents = sum(piece.starts_document for piece in batch)
                text_bytes = int(columns["num_bytes"].to_numpy().sum())
                counts += Counts(len(columns["input_ids"].values), documents, len(batch), text_bytes)
        result = {"counts": asdict(counts), "file": checksum(unfinished)}
    _write_json(folder / f"{name}.json", result)
    return result


def _encode(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, kind: pa.DataType) -> dict[str, pa.Array]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        [piece.text for piece in pieces], add_special_tokens=False
    )
    ids: list[int] = []
    ends = [0]
    for piece, encoding in zip(pieces, encodings, strict=True):
        ids += encoding.ids
        if piece.ends_document:
            ids.append(tokenizer.eos_token_id)
        ends.append(len(ids))
    tokens = pa.array(np.array(ids, dtype=kind.value_type.to_pandas_dtype()))
    raw = [piece.text.encode() for piece in pieces]
    hashes = (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1 for text in raw)
    return {
        "input_ids": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), tokens, type=kind),
        "num_bytes": pa.array([len(text) for text in raw], pa.int64()),
        "starts_document": pa.array([piece.starts_document for piece in pieces], pa.bool_()),
        "key": pa.array(list(hashes), pa.int64()),
    }


@contextlib.contextmanager
def _progress_bar() -> Iterator[Any]:
    """On a terminal only: in a log file it would be hundreds of lines."""
    hidden = not sys.stderr.isatty() or not datasets.utils.is_progress_bar_enabled()
    with datasets.utils.tqdm(desc="Tokenising", unit="B", unit_scale=True, disable=hidden) as bar:
        yield bar
