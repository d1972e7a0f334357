"""A sweep: which runs are due, several of them side by side, and each result in a file once it is there.

Nothing is decided twice: what is due is a function of the plan and of the results so far, so a sweep that was killed
goes on from the files that it left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from lm_zoo.errors import UserError
from lm_zoo.eval.report import write_json
from lm_zoo.eval.synthetic.plan import Plan, Run
from lm_zoo.files import remove_unfinished

Result = dict[str, Any]  # of `training.train`


def due(plan: Plan, results: dict[str, Result]) -> list[Run]:
    """The runs that the results so far ask for, those that are there among them. An empty `results` starts a sweep."""
    sizes = plan.budget.hidden_sizes
    return [run for mixer in plan.mixers for size in sizes for run in _due_of(plan, mixer, size, results)]


def _due_of(plan: Plan, mixer: str, hidden_size: int, results: dict[str, Result]) -> list[Run]:
    tried = []
    for rate in plan.budget.learning_rates:
        tried.append(plan.run(mixer, hidden_size, rate, 0))
        if plan.budget.enough <= 1:
            if tried[-1].name not in results:
                return tried  # one at a time: it may be enough
            if score(results[tried[-1].name]) >= plan.budget.enough:
                break
    if any(run.name not in results for run in tried):
        return tried
    best = max(tried, key=lambda run: score(results[run.name]))
    others = (plan.run(mixer, hidden_size, best.learning_rate, seed) for seed in range(1, plan.budget.seeds))
    return [*tried, *others]


def score(result: Result) -> float:
    """What learning rates are chosen by: the mean validation accuracy over the parts of the test."""
    return sum(result["validation"]) / len(result["validation"])


def sweep(plan: Plan, folder: Path, report: Callable[[Run, Result], None]) -> dict[str, Result]:
    """Do all runs that are not in `folder`, and return all results by the run's name.

    `report` hears of every run that ends. After the budget's minutes no run starts any more.
    """
    _check_device(plan)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    results = dict(_read(folder))
    minutes = math.inf if plan.budget.minutes is None else plan.budget.minutes
    deadline = time.monotonic() + 60 * minutes
    with _workers(plan.budget.jobs) as submit:
        running: dict[Future, Run] = {}
        while True:
            names = {run.name for run in running.values()}
            waiting = [run for run in due(plan, results) if run.name not in results and run.name not in names]
            while waiting and len(running) < plan.budget.jobs and time.monotonic() < deadline:
                run = waiting.pop(0)
                running[submit(run)] = run
            if not running:
                return results
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                results[run.name] = _result(future)
                write_json(folder / f"{run.name}.json", {"run": dataclasses.asdict(run), "result": results[run.name]})
                report(run, results[run.name])


def _read(folder: Path) -> Iterator[tuple[str, Result]]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield path.stem, json.loads(path.read_text(encoding="utf-8"))["result"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is not the result of a run: delete it, or give another folder") from error


def _check_device(plan: Plan) -> None:
    if plan.budget.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--budget: {plan.budget_name} wants a GPU for CUDA, and there is none here; --budget cpu needs none"
        )


def _result(future: Future) -> Result:
    try:
        return future.result()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has too little memory for so many runs side by side; the same command goes on from the runs that "
            "are finished, with --jobs fewer at a time"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "a process that was training has ended, perhaps for want of memory; the same command goes on from the runs "
            "that are finished, with --jobs fewer at a time"
        ) from error


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Callable[[Run], Future]]:
    """Processes with one thread each, which end with this one, however it ends; for one job none but this."""
    if jobs == 1:
        yield _at_once
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    executor = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield lambda run: executor.submit(_train, run)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _at_once(run: Run) -> Future:
    future: Future = Future()
    future.set_result(_train(run))
    return future


def _start_worker(parent: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _train(run: Run) -> Result:
    from lm_zoo.eval.synthetic.training import train  # Lightning takes seconds to import

    return train(run)
