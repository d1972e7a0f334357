"""What a run leaves beside its output until it is finished: enough to go on after a kill.

The folder `.OUT.linearize` holds `run.json`, what the run was started with, and `checkpoint.pt`. It is removed when the
output is whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lm_zoo.errors import UserError
from lm_zoo.files import whole_file

SECONDS_BETWEEN_CHECKPOINTS = 30.0


class WorkFolder:
    """The unfinished run that belongs to the folder `output`.

    Args:
        identity: what the result depends on; a resumed run has to agree.
        resume: whether to go on with an unfinished run.
        every_seconds: time between checkpoints; when they are taken changes nothing in the result.
    """

    def __init__(
        self, output: Path, identity: dict[str, Any], *, resume: bool, every_seconds: float | None = None
    ) -> None:
        self.path = work_path(output)
        self.every_seconds = SECONDS_BETWEEN_CHECKPOINTS if every_seconds is None else every_seconds
        self._saved = time.monotonic()
        # as JSON gives it back, so that what was read compares equal to what was written
        identity = json.loads(json.dumps(identity))
        if resume:
            self._check_identity(identity)
            return
        shutil.rmtree(self.path, ignore_errors=True)  # of a run that was killed before its first checkpoint
        with whole_file(self.path / "run.json") as unfinished:
            unfinished.write_text(json.dumps(identity, indent=2), encoding="utf-8")

    def _check_identity(self, identity: dict[str, Any]) -> None:
        before = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        before, now = _flat(before), _flat(identity)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"the unfinished run was started with {name} = {before.get(name)}, now it is {now.get(name)}; "
                    "resume it with the same, or start anew without --resume"
                )

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, if the run came as far as one."""
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # unpickling garbage can raise anything
            raise UserError(f"{path} is damaged ({type(error).__name__}); start anew without --resume") from error

    def save(self, state: dict[str, Any]) -> None:
        try:
            with whole_file(self.path / "checkpoint.pt") as unfinished:
                torch.save(state, unfinished)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch.save's own error hides it
            if not isinstance(reason, OSError):
                raise
            raise UserError(
                f"cannot save {self.path / 'checkpoint.pt'}: {reason.strerror}; the checkpoint before it is whole: "
                "free some space, then run the same again with --resume"
            ) from error
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= self.every_seconds

    def remove(self) -> None:
        shutil.rmtree(self.path)


def work_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.linearize")


def check_output(output: Path, resume: bool) -> None:
    """Refuse what would end in an error after all the work, or overwrite something."""
    unfinished = work_path(output)
    if output.exists():
        raise UserError(f"{output} exists already; choose another --output, or remove it")
    if resume and not (unfinished / "run.json").is_file():
        raise UserError(f"there is no unfinished run for {output}; leave out --resume to start one")
    if not resume and (unfinished / "checkpoint.pt").is_file():
        raise UserError(
            f"there is an unfinished run for {output}; continue it with --resume, or remove {unfinished} to start anew"
        )


class Signals:
    """Whether Ctrl-C or SIGTERM came, to be answered when it suits."""

    def __init__(self) -> None:
        self.came: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        try:
            before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may; elsewhere a run cannot be interrupted this way
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.came is not None:
            raise KeyboardInterrupt
        self.came = signum


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{where}{name}.")
        else:
            flat[f"{where}{name}"] = value
    return flat
