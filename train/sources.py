"""Where text comes from: text files, or tables with a text column (JSON lines, parquet, any `datasets` name).

Files may lie in an object store: whatever URL fsspec understands will do. A source is read as *shards* of about 16 MB,
which depend on the text alone, and a shard as *pieces* of documents of about 4 kB, cut at the borders of lines: so a
text of any size is tokenised in little memory and by several processes, and always into the same tokens.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import datasets
import fsspec

from lm_zoo.errors import UserError, one_line

PIECE_BYTES = 2**12
SHARD_BYTES = 2**24
MOST_SHARDS = 4096  # of text files; larger ones have larger shards
SEPARATOR_WINDOW = 2**20  # how far past its size a shard looks for the end of a document
ROWS_PER_BATCH = 256  # that are tokenised at a time
TABLES = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
# Where a document is cut into pieces: at a line or a word, where the usual tokenizers join nothing anyway.
BORDERS = (re.compile(rb"(?<=\n)(?=\S)"), re.compile(rb"(?<=\S)(?= \S)"))

File = Path | str  # a str is a URL


@dataclass(frozen=True)
class Piece:
    text: str
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files. A file is one document, or several where `separator` stands between them."""

    files: tuple[File, ...]
    separator: str | None = None

    def identity(self) -> list:
        return ["text", self.separator, PIECE_BYTES, [file_identity(file) for file in self.files]]

    def shards(self) -> Iterator[dict[str, list]]:
        """Where the text of each shard lies: whole files, and parts of a large one.

        A part `continues` a document that the part before began, or `goes_on` in the next one.
        """
        size = max(SHARD_BYTES, sum(map(file_size, self.files)) // MOST_SHARDS)
        names = ("file", "start", "end", "continues", "goes_on")
        columns: dict[str, list] = {name: [] for name in names}
        filled = 0
        for file in self.files:
            for part in _parts(file, self.separator, size):
                for name, value in zip(names, (file, *part), strict=True):
                    columns[name].append(value)
                filled += part[1] - part[0]
                if filled >= size:
                    yield columns
                    columns, filled = {name: [] for name in names}, 0
        if filled:
            yield columns

    def pieces(self, rows: dict[str, list]) -> Iterator[Piece]:
        mark = None if self.separator is None else self.separator.encode()
        for file, start, end, continues, goes_on in zip(*rows.values(), strict=True):
            with open_file(file) as stream:
                stream.seek(start)
                raw = stream.read(end - start)
            for first, last in _documents(raw, mark, continues, goes_on):
                starts, ends = first > 0 or not continues, last < len(raw) or not goes_on
                for left, right in _cut(raw, first, last):
                    text = _decoded(raw[left:right], file, start + left)
                    yield Piece(text, starts and left == first, ends and right == last)

    def what(self) -> str:
        return _and_more(self.files)


@dataclass(frozen=True)
class Table:
    """Rows with a text column: each one is a document. Local files, or the name (or folder) of a `datasets` dataset."""

    name: str  # what `datasets.load_dataset` takes; "json" or "parquet" for local files
    files: tuple[File, ...] = ()
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    column_option: str = "data.text_column"  # what sets the column, for messages

    def identity(self) -> list:
        folder = Path(self.name)
        files = self.files or (sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else ())
        options = [self.name, self.config, self.split, self.text_column, PIECE_BYTES]
        return ["table", *options, [file_identity(file) for file in files]]

    def shards(self) -> Iterator[dict[str, list]]:
        """The text column, part by part. Files are streamed; so is a dataset, unless it is downloaded first."""
        texts: list[str] = []
        filled = 0
        with self._told():
            files = [str(file) for file in self.files] or None
            options = {"data_files": files, "split": self.split, "streaming": self.streaming or files is not None}
            rows = datasets.load_dataset(self.name, self.config, **options)
        names = rows.column_names  # None where a stream does not know them yet
        if names is not None and self.text_column not in names:
            raise UserError(
                f"{self.what()} has no column {self.text_column!r}, only {', '.join(names)}; set {self.column_option}"
            )
        batches = rows.select_columns(self.text_column).iter(ROWS_PER_BATCH)
        while True:
            with self._told():
                batch = next(batches, None)
            if batch is None:
                break
            texts += batch[self.text_column]
            filled += sum(len(text) for text in batch[self.text_column] if isinstance(text, str))
            if filled >= SHARD_BYTES:
                yield {self.text_column: texts}
                texts, filled = [], 0
        if texts:
            yield {self.text_column: texts}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise UserError(f"cannot read {self.what()}: {reason}") from error

    def pieces(self, rows: dict[str, list]) -> Iterator[Piece]:
        for text in rows[self.text_column]:
            if not isinstance(text, str):
                raise UserError(
                    f"{self.what()}: column {self.text_column!r} holds {type(text).__name__}, expected text; "
                    f"set {self.column_option}"
                )
            raw = text.encode()
            for start, end in _cut(raw, 0, len(raw)):
                yield Piece(raw[start:end].decode(), start == 0, end == len(raw))

    def what(self) -> str:
        return _and_more(self.files) if self.files else f"the dataset {self.name!r}"


Source = TextFiles | Table


def find_files(patterns: Sequence[str]) -> tuple[File, ...]:
    """Files from paths, globs (`**` too), URLs, and `@list` entries: a file that holds one path per line."""
    found: list[File] = []
    for pattern in patterns:
        if "://" in pattern:
            found += _find_urls(pattern)
        elif pattern.startswith("@"):
            listing = _existing(Path(pattern[1:]))
            lines = [line for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
            for line in lines:  # a path is seen from the folder of its list
                found += _find_urls(line) if "://" in line else [_existing(listing.parent / line)]
        elif glob.has_magic(pattern) and not Path(pattern).exists():
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise UserError(f"no file matches {pattern!r}; check the pattern")
            found += matches
        else:
            found.append(_existing(Path(pattern)))
    return tuple(dict.fromkeys(found))


def _find_urls(pattern: str) -> list[File]:
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        paths = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        found: list[File] = [system.unstrip_protocol(path) for path in paths if system.isfile(path)]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot open {pattern}: {one_line(error)}") from error
    if not found:
        raise UserError(f"there is no file {pattern}; check the address")
    return found


def file_source(
    files: tuple[File, ...],
    *,
    text_column: str,
    separator: str | None,
    streaming: bool,
    column_option: str = Table.column_option,
) -> Source:
    """The source for local files, by their extension: tables for .jsonl, .json and .parquet, text for all others."""
    kinds = {TABLES.get(PurePosixPath(file).suffix.lower()) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{_and_more(files)}: text, JSON lines and parquet cannot be mixed in one source; choose one kind"
        )
    kind = kinds.pop()
    if kind is None:
        return TextFiles(files, separator)
    for file in files:
        if file_size(file) == 0:
            raise UserError(f"{file} is empty; give a file with text in it")
    return Table(kind, files, text_column=text_column, streaming=streaming, column_option=column_option)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give its files, for example '{path}/**/*.txt'")
    return path


def open_file(file: File) -> BinaryIO:
    return file.open("rb") if isinstance(file, Path) else fsspec.open(file, "rb").open()


def file_size(file: File) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    system, path = fsspec.core.url_to_fs(file)
    return system.size(path)


def file_identity(file: File) -> list[Any]:
    """What changes when the file does."""
    if isinstance(file, Path):
        status = file.stat()
        return [str(file.resolve()), status.st_size, status.st_mtime_ns]
    system, path = fsspec.core.url_to_fs(file)
    return [file, system.size(path), str(system.ukey(path))]


def _parts(file: File, separator: str | None, size: int) -> Iterator[tuple[int, int, bool, bool]]:
    """Start, end, continues, goes on: for every part of one file, in order."""
    start, last, continues = 0, file_size(file), False
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_file(file)) if last > size else None
        while start < last:
            end, goes_on = last, False
            if last - start > size + SEPARATOR_WINDOW:
                end, goes_on = _part_end(stream, start + size, separator)
            yield start, end, continues, goes_on
            start, continues = end, goes_on


def _part_end(stream: BinaryIO, target: int, separator: str | None) -> tuple[int, bool]:
    """Where a part ends that should end at about `target`, and whether that is within a document."""
    mark = b"" if separator is None else separator.encode()
    begin = target - max(0, len(mark) - 1)
    stream.seek(begin)
    window = stream.read(SEPARATOR_WINDOW)
    found = window.find(mark) if mark else -1
    if found >= 0:
        return begin + found + len(mark), False
    return begin + _piece_end(window, target - begin, len(window)), True


def _documents(text: bytes, mark: bytes | None, continues: bool, goes_on: bool) -> Iterator[tuple[int, int]]:
    """Start and end of each document in a part of a file; blank ones are none."""
    if mark is None:
        yield 0, len(text)
        return
    start = 0
    while start < len(text):
        end = text.find(mark, start)
        end = len(text) if end < 0 else end
        if text[start:end].strip() or (continues and start == 0) or (goes_on and end == len(text)):
            yield start, end
        start = end + len(mark)


def _decoded(raw: bytes, file: File, start: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = start + error.start
        raise UserError(f"{file}: byte {where} is not UTF-8; convert the file to UTF-8 or leave it out") from error


def _cut(text: bytes, start: int, last: int) -> Iterator[tuple[int, int]]:
    """Start and end of each piece of text[start:last]."""
    while start < last:
        end = _piece_end(text, start, last)
        yield start, end
        start = end


def _piece_end(text: bytes, start: int, last: int) -> int:
    """The first line border after PIECE_BYTES, else the first word border, else a border between two characters."""
    if last - start <= PIECE_BYTES:
        return last
    end = min(start + 4 * PIECE_BYTES, last)
    for border in BORDERS:
        found = border.search(text, start + PIECE_BYTES, end)
        if found is not None:
            return found.end()
    while end < last and text[end] & 0b1100_0000 == 0b1000_0000:  # a UTF-8 continuation byte
        end += 1
    return end


def _and_more(files: Sequence[File]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
