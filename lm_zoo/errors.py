"""Errors that a person caused and can mend: they are shown as one line, never as a traceback."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Bad input from the person at the keyboard. The message says what is wrong and what to do, in one line.

    It is a ValueError, so that library code which catches ValueError at a boundary treats both alike.
    """


def one_line(error: BaseException) -> str:
    """The message of `error` on a single line, with a remedy for the operating system's commonest complaints."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        remedies = {
            errno.ENOSPC: "free some space, or write to another disk",
            errno.EDQUOT: "free some space, or write to another disk",
            errno.EROFS: "write to a folder that can be written",
            errno.EACCES: "check who may read and write it",
            errno.ENOENT: "check the path",
        }
        remedy = remedies.get(error.errno)
        return f"{error.strerror}{where}" + (f"; {remedy}" if remedy else "")
    return " ".join(str(error).split()) or type(error).__name__


def is_user_error(error: BaseException) -> bool:
    """Whether `error` tells a person what to change, rather than us what to repair.

    That holds for UserError, for what the operating system refuses (a missing file, a full disk), and for the
    ValueError or TypeError that one of this package's own functions raised at its door. The same from deeper down, in
    somebody else's code, are bugs and keep their traceback.
    """
    if isinstance(error, UserError | OSError):
        return True
    if not isinstance(error, ValueError | TypeError) or error.__traceback__ is None:
        return False
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "").split(".")[0] == "lm_zoo"
