"""Outputs appear whole or not at all: they are written under a temporary name and renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes its place at the end if nothing went wrong, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an older one of that name is moved away first and deleted last."""
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    unfinished, older = workplace / "new", workplace / "old"
    try:
        unfinished.mkdir()
        yield unfinished
        if path.exists():
            path.rename(older)
        unfinished.rename(path)
    finally:
        if older.exists() and not path.exists():
            older.rename(path)
        shutil.rmtree(workplace, ignore_errors=True)
        if is_new and not any(path.parent.iterdir()):
            path.parent.rmdir()


def remove_folder(path: Path) -> None:
    """Removes a folder; from the first moment on, none of that name is there."""
    path.rename(unfinished := path.with_name(f".{path.name}-{os.getpid()}.tmp"))
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of outputs in `folder`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
