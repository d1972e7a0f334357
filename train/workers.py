"""Processes that take tasks from a stream and hand the results back in its order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lm_zoo.errors import UserError

PARALLELISM = "TOKENIZERS_PARALLELISM"


def in_order(
    work: Callable[[str, Any], Any], tasks: Iterator[tuple[str, Any]], known: Mapping[str, Any], workers: int | None
) -> Iterator[tuple[str, Any]]:
    """Yields `(name, work(name, task))` for each task; what is `known` is not done again.

    A few tasks per process are under way at a time, so a stream of any length takes little memory. A single task is
    done here, with all the tokenizer's own threads. `workers` is by default the number of cores.
    """
    count = workers or cores()
    tasks = iter(tasks)
    first = [task for _, task in zip(range(2), tasks, strict=False)]
    tasks = _chain(first, tasks)
    if count == 1 or len(first) < 2:
        with _parallelism("true" if workers is None else "false"):
            for name, task in tasks:
                yield name, known[name] if name in known else work(name, task)
        return
    with _parallelism("false"), _Pool(work, count) as pool:
        waiting: deque[tuple[str, Future | None]] = deque()
        for name, task in tasks:
            waiting.append((name, None if name in known else pool.submit(name, task)))
            while len(waiting) > 2 * count or (waiting and waiting[0][1] is None):
                yield _result(waiting, known)
        while waiting:
            yield _result(waiting, known)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chain(first: list, rest: Iterator) -> Iterator:
    yield from first
    yield from rest


def _result(waiting: deque, known: Mapping[str, Any]) -> tuple[str, Any]:
    name, future = waiting.popleft()
    try:
        return name, known[name] if future is None else future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that was tokenising has ended, perhaps for want of memory; run it again with fewer workers"
        ) from error


class _Pool:
    """Where the system can fork, the processes share what the parent has loaded; they never outlive it."""

    def __init__(self, work: Callable[[str, Any], Any], count: int) -> None:
        self._others = set(multiprocessing.active_children())
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._executor = ProcessPoolExecutor(
            count, multiprocessing.get_context(method), initializer=_start_worker, initargs=(work, os.getpid())
        )

    def __enter__(self) -> _Pool:
        return self

    def submit(self, name: str, task: Any) -> Future:
        return self._executor.submit(_do, name, task)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """However it ends, also when what is under way is not wanted any more."""
        self._executor.shutdown(wait=kind is None, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
            process.join()


_work: Callable[[str, Any], Any]  # of a worker process


def _start_worker(work: Callable[[str, Any], Any], parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(name: str, task: Any) -> Any:
    return _work(name, task)


@contextlib.contextmanager
def _parallelism(value: str) -> Iterator[None]:
    """One level of it: the tokenizer's threads fill the machine in one process, and are off in one of several."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
