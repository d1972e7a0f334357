"""Ten megabytes of text that every machine has: the standard library of the Python that runs this, source and docs.

Which files are used, and which of them are held out for evaluation, is a pure function of their paths and contents: two
machines with the same Python get the same corpus.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lm_zoo.errors import UserError

BYTES_USED = 10_000_000
BYTES_NEEDED = 2_000_000
HELD_OUT_SHARE = 0.03
SUFFIXES = (".py", ".rst", ".txt")
# Other people's packages, binaries, and `encodings`, whose megabyte is tables of numbers.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings", "ensurepip"}
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    path: str  # relative to the standard library, with forward slashes
    text: str

    @property
    def order(self) -> float:
        """A number in [0, 1) that depends on the path alone."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big") / 2**64

    @property
    def held_out(self) -> bool:
        return self.order < HELD_OUT_SHARE


def stdlib_corpus(folder: Path | None = None) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents), about BYTES_USED bytes in all, in the order of their paths' hashes.

    Test suites fill up only what the library itself leaves free. Raises UserError if there is hardly any source, as in
    a Python that ships its library compiled or zipped.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    # Within the library and within the tests, the order of the hashes is as good as random and always the same.
    documents = sorted([*files(folder), *help_topics()], key=lambda document: (is_test(document.path), document.order))
    used, size = [], 0
    for document in documents:
        if size < BYTES_USED:
            used.append(document)
            size += len(document.text.encode())
    if size < BYTES_NEEDED:
        raise UserError(
            f"the Python library in {folder} has only {size:,} bytes of source; run this with a Python that comes with "
            "its library's source, for example PYTHON=python3.12 bash scripts/quickstart.sh in a clone without .venv"
        )
    used.sort(key=lambda document: document.order)
    return [d for d in used if not d.held_out], [d for d in used if d.held_out]


def files(folder: Path) -> Iterator[Document]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]  # not even walked
        for path in (Path(root, name) for name in names if name.endswith(SUFFIXES)):
            relative = path.relative_to(folder).as_posix()
            if relative == "pydoc_data/topics.py":  # help_topics() has what is in it
                continue
            try:
                text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:  # the compiler's tests hold sources in other encodings, on purpose
                continue
            if text.strip():
                yield Document(relative, text)


def help_topics() -> Iterator[Document]:
    """The language reference as `help("topics")` shows it: prose, kept as a dictionary in a module."""
    if importlib.util.find_spec("pydoc_data") and importlib.util.find_spec("pydoc_data.topics"):
        for name, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
            yield Document(f"pydoc_data/topics/{name}", text.strip() + "\n")


def is_test(path: str) -> bool:
    return bool(TESTS.intersection(path.split("/")))
