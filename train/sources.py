"""Where text comes from: text files, or tables with a text column (JSON lines, parquet, any `datasets` name).

A source is read as *pieces* of documents of about 4 kB, cut at the borders of lines, so that a text of any size is
tokenised in little memory and by several processes.
"""

from __future__ import annotations

import glob
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from lm_zoo.errors import UserError

PIECE_BYTES = 2**12
ROWS_PER_BATCH = 256  # that are tokenised at a time
TABLES = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
# Where a document is cut into pieces: at a line or a word, where the usual tokenizers join nothing anyway.
BORDERS = (re.compile(rb"(?<=\n)(?=\S)"), re.compile(rb"(?<=\S)(?= \S)"))


@dataclass(frozen=True)
class Piece:
    text: str
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files. A file is one document, or several where `separator` stands between them."""

    files: tuple[Path, ...]
    separator: str | None = None

    def identity(self) -> list:
        return ["text", self.separator, PIECE_BYTES, [_file_identity(file) for file in self.files]]

    def rows(self, scratch: Path | None = None) -> datasets.Dataset:
        """One row per piece: where it lies. The text itself is read by the process that tokenises it."""
        columns: dict[str, list] = {"file": [], "start": [], "end": [], "starts_document": [], "ends_document": []}
        for file in self.files:
            for row in _file_pieces(file, self.separator):
                for name, value in zip(columns, (str(file), *row), strict=True):
                    columns[name].append(value)
        if not columns["file"]:
            raise UserError(f"{_and_more(self.files)}: no text in there; give a file that is not empty")
        return datasets.Dataset.from_dict(columns)

    def pieces(self, rows: dict[str, list]) -> Iterator[Piece]:
        for file, start, end, starts, ends in zip(*rows.values(), strict=True):
            with open(file, "rb") as stream:
                stream.seek(start)
                raw = stream.read(end - start)
            try:
                yield Piece(raw.decode("utf-8"), starts, ends)
            except UnicodeDecodeError as error:
                where = start + error.start
                raise UserError(
                    f"{file}: byte {where} is not UTF-8; convert the file to UTF-8 or leave it out"
                ) from error


@dataclass(frozen=True)
class Table:
    """Rows with a text column: each one is a document. Local files, or the name (or folder) of a `datasets` dataset."""

    name: str  # what `datasets.load_dataset` takes; "json" or "parquet" for local files
    files: tuple[Path, ...] = ()
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False

    def identity(self) -> list:
        folder = Path(self.name)
        files = self.files or (sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else ())
        options = [self.name, self.config, self.split, self.text_column, PIECE_BYTES]
        return ["table", *options, [_file_identity(file) for file in files]]

    def rows(self, scratch: Path | None = None) -> datasets.Dataset | datasets.IterableDataset:
        """The text column. Local files are copied to Arrow in the folder `scratch`; without one they are streamed."""
        files = [str(file) for file in self.files] or None
        options = {"streaming": self.streaming or (files is not None and scratch is None)}
        if files is not None and not options["streaming"]:
            options["cache_dir"] = str(scratch)
        try:
            rows = datasets.load_dataset(self.name, self.config, data_files=files, split=self.split, **options)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise UserError(f"cannot read {self._what()}: {reason}") from error
        names = rows.column_names  # None where a stream does not know them yet
        if names is not None and self.text_column not in names:
            raise UserError(
                f"{self._what()} has no column {self.text_column!r}, only {', '.join(names)}; set data.text_column"
            )
        return rows.select_columns(self.text_column)

    def pieces(self, rows: dict[str, list]) -> Iterator[Piece]:
        for text in rows[self.text_column]:
            if not isinstance(text, str):
                raise UserError(
                    f"{self._what()}: column {self.text_column!r} holds {type(text).__name__}, expected text; "
                    "set data.text_column"
                )
            raw = text.encode()
            for start, end in _cut(raw, 0, len(raw)):
                yield Piece(raw[start:end].decode(), start == 0, end == len(raw))

    def _what(self) -> str:
        return _and_more(self.files) if self.files else f"the dataset {self.name!r}"


Source = TextFiles | Table


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Files from paths, globs (`**` too) and `@list` entries: a file that holds one path per line, from its folder."""
    found: list[Path] = []
    for pattern in patterns:
        if pattern.startswith("@"):
            listing = _existing(Path(pattern[1:]))
            lines = listing.read_text(encoding="utf-8").splitlines()
            found += [_existing(listing.parent / line) for line in lines if line.strip()]
        elif glob.has_magic(pattern) and not Path(pattern).exists():
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise UserError(f"no file matches {pattern!r}; check the pattern")
            found += matches
        else:
            found.append(_existing(Path(pattern)))
    return tuple(dict.fromkeys(found))


def file_source(files: tuple[Path, ...], *, text_column: str, separator: str | None, streaming: bool) -> Source:
    """The source for local files, by their extension: tables for .jsonl, .json and .parquet, text for all others."""
    kinds = {TABLES.get(file.suffix.lower()) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{_and_more(files)}: text, JSON lines and parquet cannot be mixed in one source; choose one kind"
        )
    kind = kinds.pop()
    if kind is None:
        return TextFiles(files, separator)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; give a file with text in it")
    return Table(kind, files, text_column=text_column, streaming=streaming)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give its files, for example '{path}/**/*.txt'")
    return path


def _file_identity(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return (str(file.resolve()), status.st_size, status.st_mtime_ns)


def _file_pieces(file: Path, separator: str | None) -> Iterator[tuple[int, int, bool, bool]]:
    """Start, end, starts a document, ends a document: for every piece of one file, in order."""
    size = file.stat().st_size
    if size == 0:
        return
    if separator is None and size <= PIECE_BYTES:
        yield 0, size, True, True
        return
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for first, last in _documents(text, separator):
            for start, end in _cut(text, first, last):
                yield start, end, start == first, end == last


def _documents(text: mmap.mmap, separator: str | None) -> Iterator[tuple[int, int]]:
    if separator is None:
        yield 0, len(text)
        return
    mark, start = separator.encode(), 0
    while start < len(text):
        end = text.find(mark, start)
        end = len(text) if end < 0 else end
        if text[start:end].strip():
            yield start, end
        start = end + len(mark)


def _cut(text: mmap.mmap | bytes, start: int, last: int) -> Iterator[tuple[int, int]]:
    """Start and end of each piece of text[start:last]."""
    while start < last:
        end = _piece_end(text, start, last)
        yield start, end
        start = end


def _piece_end(text: mmap.mmap | bytes, start: int, last: int) -> int:
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


def _and_more(files: Sequence[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
