"""Tasks by name: this package's, a person's own files, and lm-eval's. Anything amiss is one UserError."""

from __future__ import annotations

import difflib
import importlib.resources
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from lm_eval.api.metrics import bypass  # noqa: F401  registers the metrics
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from lm_zoo.errors import UserError, one_line

OWN = importlib.resources.files("lm_zoo.configs") / "tasks"


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> TaskDict:
    """Tasks, groups or tags, with their data. lm-eval's many files are only read for a name that is nowhere else."""
    folders = [Path(str(OWN))] + ([] if include_path is None else [check_folder(Path(include_path))])
    manager = TaskManager(include_path=folders, include_defaults=False)
    if _unknown(names, manager):
        manager = TaskManager(include_path=folders, include_defaults=True)
    for name in _unknown(names, manager):
        broken = "" if include_path is None else _broken_file(Path(include_path))
        raise UserError(f"no task {name!r}{_nearest(name, manager.all_tasks)}{broken}")
    for name in names:
        check_metrics(name, manager)
    return _checked(_built(names, manager))


def check_folder(folder: Path) -> Path:
    """A folder that can be read and has a task file somewhere."""
    if not folder.is_dir():
        raise UserError(f"include_path {folder} is not a folder; name one that holds task files (.yaml)")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"include_path {folder} cannot be read; check who may read it")
    if next(folder.rglob("*.yaml"), None) is None:
        raise UserError(f"include_path {folder} holds no task files (.yaml)")
    return folder


def check_metrics(name: str, manager: TaskManager) -> None:
    """UserError for a metric or aggregation of a task that lm-eval does not have."""
    entry = manager.task_index[name]
    config = entry.cfg or {}
    below = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags if not config else [])
    for child in below:
        if isinstance(child, str) and child in manager.task_index:
            check_metrics(child, manager)
    for metric in config.get("metric_list") or []:
        if not isinstance(metric, dict):
            raise UserError(f"task {name!r}: metric_list holds {metric!r}; write it as {{metric: {metric}}}")
        called, aggregation = metric.get("metric"), metric.get("aggregation")
        if "process_results" not in config and not metric.get("hf_evaluate"):
            _check_known(f"task {name!r}: no metric", called, METRIC_REGISTRY)
        _check_known(f"task {name!r}: no aggregation", aggregation, AGGREGATION_REGISTRY)


def _check_known(what: str, name: object, known: Iterable[str]) -> None:
    if isinstance(name, str) and not Path(name).is_absolute() and name not in known:  # an absolute path: a !function
        raise UserError(f"{what} {name!r}{_nearest(name, known)}")


def check_examples(task: Task) -> None:
    """UserError if a task cannot have as many worked examples as it is set to."""
    count = task.get_config("num_fewshot")
    if not count:
        return
    task.set_fewshot_seed(0)
    try:
        task.fewshot_context(next(iter(task.eval_docs)), count)
    except (ValueError, AssertionError) as error:
        raise UserError(f"num_fewshot {count} is too many for task {task.task_name!r}: {one_line(error)}") from error


def _unknown(names: Iterable[str], manager: TaskManager) -> list[str]:
    return [name for name in names if name not in manager.task_index]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _broken_file(folder: Path) -> str:
    """The first file in a folder that lm-eval passed over because it cannot be read."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f"; {path} cannot be read ({one_line(error)})"
    return ""


def _built(names: Sequence[str], manager: TaskManager) -> TaskDict:
    found: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # a task file is its writer's program: whatever it raises is theirs to mend
            if _is_about_data(error):
                raise UserError(
                    f"the data of task {name!r} is neither here nor to be fetched: {one_line(error)}; fetch it once "
                    "where there is a network, or name local files in a task file of your own"
                ) from error
            raise UserError(f"task {name!r} cannot be set up: {type(error).__name__}: {one_line(error)}") from error
        for kind in found:
            found[kind] |= loaded.get(kind, {})
    return found


def _is_about_data(error: BaseException) -> bool:
    """Whether files or a network were missing; `datasets` and `huggingface_hub` wrap the cause now and then."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub")


def _checked(found: TaskDict) -> TaskDict:
    for name, task in found["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name!r} has pictures or sound; choose one of text alone")
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name!r} runs code that the model writes, which is refused; choose another")
    return found
