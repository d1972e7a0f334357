"""The ranks of a test: forks of one process, so that what they need is imported once."""

import os
import sys
import traceback
from collections.abc import Callable


def on_ranks(size: int, run: Callable[[int], None]) -> None:
    """Calls `run(rank)` in so many processes, of which this one is the first. It ends with an error where one did."""
    sys.stdout.flush()
    others = []
    for rank in range(1, size):
        process = os.fork()
        if process == 0:
            _end(run, rank)
        others.append(process)
    try:
        run(0)
    finally:
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in others]
    if any(codes):
        sys.exit(f"ranks 1 and on ended with {codes}")


def _end(run: Callable[[int], None], rank: int) -> None:
    code = 1
    try:
        run(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def as_by_torchrun(run: Callable[[], None]) -> None:
    """Calls `run()` in WORLD_SIZE processes, LOCAL_WORLD_SIZE to a machine, each with its rank in the environment."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])

    def placed(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
        run()

    on_ranks(int(os.environ["WORLD_SIZE"]), placed)
