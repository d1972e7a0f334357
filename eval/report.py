"""Writing results: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from lm_zoo.files import whole_file


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write beside `path` under a temporary name, then rename. On any failure the earlier file is untouched."""
    with whole_file(Path(path)) as unfinished, unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def check_writable(path: str | Path) -> None:
    """Refuse an output path that cannot work before hours are spent on what should go there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is to be written", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist", str(path.parent))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written to", str(path.parent))
