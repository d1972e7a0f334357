"""lm-eval's tasks on any causal LM: what `lm-zoo eval harness` does."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from lm_eval.evaluator import evaluate as lm_evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.eval.harness.adapter import HarnessLM
from lm_zoo.eval.harness.tasks import check_examples, load_tasks

SEED = 1234  # lm-eval's, for the choice of examples and for sampling
RESAMPLES = 1000  # of the few metrics whose standard error is bootstrapped


@dataclass(frozen=True)
class Measured:
    """One metric of one task, or of a group of tasks."""

    task: str
    metric: str  # with lm-eval's filter in brackets, if there is one
    value: float | None  # None where it is no finite number
    stderr: float | None
    documents: int | None  # None for groups


@dataclass(frozen=True)
class HarnessReport:
    measured: list[Measured]
    tokens: int  # of all texts that the tasks asked about
    tokens_read: int  # by the model: less where texts have a beginning in common
    texts_cut: int  # on the left, to max_length
    seconds: float  # of the evaluation, without loading
    lm_eval: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    read_twice: bool = False,
    prefix: bool = False,
    progress: TextIO | None = None,
) -> HarnessReport:
    """Runs tasks by name.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: folder with task files of one's own, looked through before lm-eval's.
        num_fewshot: worked examples before each question; the task's own number if not given, and for tasks that fix
            it at 0.
        limit: only the first so many documents of each task.
        batch_size, max_length, read_twice, prefix, progress: as in `HarnessLM`.
    """
    options = {"batch_size": batch_size, "max_length": max_length, "read_twice": read_twice, "prefix": prefix}
    lm = HarnessLM(model, tokenizer, progress=progress, **options)
    with _quiet(), _seeded(model.device):
        found = load_tasks(tasks, include_path)
        for task in found["tasks"].values():
            default = task.get_config("num_fewshot")
            if default is None or (num_fewshot is not None and default != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            check_examples(task)
            task.set_fewshot_seed(seed=SEED)
        start = time.perf_counter()
        results = lm_evaluate(lm=lm, task_dict=found, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    return HarnessReport(
        measured=list(_measured(results)),
        tokens=lm.work.asked,
        tokens_read=lm.work.read,
        texts_cut=lm.texts_cut,
        seconds=time.perf_counter() - start,
        lm_eval=version("lm_eval"),
    )


def _measured(results: dict[str, Any]) -> Iterator[Measured]:
    for task, row in results["results"].items():
        documents = results["n-samples"].get(task, {}).get("effective")
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            yield Measured(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=_finite(value),
                stderr=_finite(row.get(f"{metric}_stderr,{kind}")),
                documents=documents,
            )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval reports on itself in bars, logs and prints, and forks processes to resample: none of it here.

    The hub's log of its retries goes to where standard error was when it was imported, so that is lowered, too.
    """
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"),
        ):
            yield
    finally:
        hub_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """lm-eval's tasks draw from the global generators; afterwards these are as they were."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
