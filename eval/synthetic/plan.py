"""What a sweep is made of, as data: `configs/synthetic/TASK.yaml`, one of its budgets, and the mixers asked for.

A file names a class of `TASKS` and its sizes, the model, named variants of mixers, and budgets:

    title: Recall                               for people; by default, the file's name
    task: mqar                                  a key of `TASKS`
    sizes: {vocabulary: 512}                    the task's own
    against: state                              what the picture has below: state (elements), length or tests (by name)
    published: "..."                            what the paper reports, for the page of results
    mixers: {deltanet: {num_heads: 1}}          names for --mixers, with `type` where the name is free
    budgets: {cpu: {...}, gpu: {...}, paper: {...}}         fields of `Budget`
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.resources
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from lm_zoo.config import ZooConfig, suggest
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic import TASKS
from lm_zoo.eval.synthetic.task import Task
from lm_zoo.layers import MIXERS


@dataclass(frozen=True)
class Budget:
    """How long to train what, and what on.

    A part, in `train` and in `test`, is a mapping: `length`, the tokens of a text; `count`, its texts; all else are
    sizes of the task, in place of the file's. In `train` either every batch is new, the parts taking turns for so many
    `steps`, or `count` texts are drawn once and read for so many `epochs`.

    The search: each mixer of each hidden size is trained with seed 0 at the learning rates in the order given, until
    one has a validation score of `enough`; the best of them then with the other seeds. The score is the mean accuracy
    over the parts of the test, on examples of their own.
    """

    mixers: tuple[str, ...]
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    learning_rates: tuple[float, ...]
    model: dict[str, Any] = field(default_factory=dict)  # options of ZooConfig, beside the file's
    hidden_sizes: tuple[int, ...] = (64,)
    convolution: int | None = None  # its tokens; every other block, from the first, is then a `GatedConvolution`
    whole: tuple[str, ...] = ()  # variants that keep their mixer in every block even so
    seeds: int = 3
    batch_size: int = 32
    steps: int | None = None
    epochs: int | None = None
    weight_decay: float = 0.1
    warmup: float = 0.1  # part of all steps; the learning rate then falls along a cosine to 0
    enough: float = 2.0  # above 1: all learning rates are tried
    check_every: int = 100  # steps between validations, of which one with a score of `stop_at` ends the run
    stop_at: float = 1.0
    validation: int = 128  # examples of each part of the test
    jobs: int = 2  # runs side by side
    minutes: float | None = None  # no run starts after that
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One training run, of plain values alone: it goes to another process, and its digest names its file."""

    task: str
    sizes: dict[str, Any]
    mixer: str
    options: dict[str, Any]
    hidden_size: int
    model: dict[str, Any]
    learning_rate: float
    seed: int
    training: dict[str, Any]  # of the budget what bears upon one run

    @property
    def name(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.mixer}-{self.hidden_size}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def task_of(self, part: dict[str, Any]) -> Task:
        return make_task(self.task, self.sizes | {k: v for k, v in part.items() if k not in ("length", "count")})

    def config(self) -> ZooConfig:
        parts = (*self.training["train"], *self.training["test"])
        return ZooConfig(
            vocab_size=max(self.task_of(part).vocab_size for part in parts),
            hidden_size=self.hidden_size,
            mixers={self.mixer: self.options},
            **self.model,
        )


OF_ONE_RUN = (
    *("train", "test", "batch_size", "steps", "epochs", "weight_decay", "warmup", "check_every", "stop_at"),
    *("validation", "device", "convolution"),
)


@dataclass(frozen=True)
class Plan:
    """A file's budget with the mixers that were asked for."""

    name: str
    title: str
    task: str
    sizes: dict[str, Any]
    against: str
    published: str
    model: dict[str, Any]
    mixers: dict[str, dict[str, Any]]
    budget_name: str
    budget: Budget
    chosen: bool  # whether the mixers were asked for, rather than the budget's own

    def run(self, mixer: str, hidden_size: int, learning_rate: float, seed: int) -> Run:
        training = {key: getattr(self.budget, key) for key in OF_ONE_RUN}
        if mixer.partition(":")[0] in self.budget.whole:
            training["convolution"] = None
        options = {"type": mixer} | self.mixers[mixer]
        model = self.model | self.budget.model
        return Run(self.task, self.sizes, mixer, options, hidden_size, model, learning_rate, seed, training)

    def check(self) -> None:
        """Build every task and every model's configuration, so that what cannot be fails before any training."""
        for mixer in self.mixers:
            for hidden_size in self.budget.hidden_sizes:
                try:
                    self.run(mixer, hidden_size, self.budget.learning_rates[0], 0).config()
                except (TypeError, ValueError) as error:
                    raise UserError(f"--mixers: {error}") from error


def make_task(name: str, sizes: dict[str, Any]) -> Task:
    known = [size.name for size in dataclasses.fields(TASKS[name])]
    for size in sizes:
        if size not in known:
            raise ValueError(f"unknown size {size!r} of the task {name!r}{suggest(size, known)}")
    return TASKS[name](**sizes)


def plan_names() -> list[str]:
    """What `--task` takes: the files of configs/synthetic."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir())


def read_plan(name: str, budget: str, mixers: list[str] | None = None, jobs: int | None = None) -> Plan:
    """The plan of a task's budget; `mixers` as on the command line, by default the budget's own, as `jobs` is.

    Raises UserError with the nearest names where a task, a budget, a mixer or an option of one does not exist.
    """
    if name not in plan_names():
        raise UserError(f"--task: there is no task {name!r}{suggest(name, plan_names())}")
    content = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    variants, budgets = content["mixers"], content["budgets"]
    if budget not in budgets:
        raise UserError(f"--budget: {name} has no budget {budget!r}{suggest(budget, budgets)}")
    chosen = Budget(**{key: tuple(v) if isinstance(v, list) else v for key, v in budgets[budget].items()})
    asked = dict(parse_mixer(text, variants) for text in (mixers or chosen.mixers))
    plan = Plan(
        name=name,
        title=content.get("title", name.replace("_", " ").capitalize()),
        task=content["task"],
        sizes=content.get("sizes", {}),
        against=content["against"],
        published=content["published"],
        model=content["model"],
        mixers=asked,
        budget_name=budget,
        budget=dataclasses.replace(chosen, mixers=tuple(asked), jobs=jobs or chosen.jobs),
        chosen=mixers is not None,
    )
    plan.check()
    return plan


def parse_mixer(text: str, variants: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """`deltanet:num_heads=2:use_gate=true`, a variant of the file or a mixer of the zoo -> its label and options."""
    name, *given = text.split(":")
    if name not in variants and name not in MIXERS:
        near = difflib.get_close_matches(name, {*variants, *MIXERS}, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        others = sorted(set(MIXERS) - set(variants))
        raise UserError(
            f"--mixers: there is no mixer {name!r}{hint}; of this task: {', '.join(sorted(variants))}; "
            f"with their default options: {', '.join(others)}"
        )
    options = {"type": name} | variants.get(name, {})
    for pair in given:
        option, equals, value = pair.partition("=")
        if not option or not equals:
            raise UserError(f"--mixers: {pair!r} of {text!r} must be OPTION=VALUE")
        options[option] = yaml.safe_load(value)
    return text, options


def _folder():
    return importlib.resources.files("lm_zoo.configs") / "synthetic"
