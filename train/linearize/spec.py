"""What a linearization does, as data: `LinearizeSpec`, read from the YAML files in `configs/linearize/`.

Unknown keys are refused by name, wrong values when the spec is made. The command line and Python override single values
by their dotted name: `spec.override({"options.window": 16, "transfer.learning_rate": 0.01})`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from lm_zoo.config import suggest
from lm_zoo.errors import UserError, one_line
from lm_zoo.train.optim import Schedule

FREE = ("options",)  # of the mixer, which checks them itself


@dataclass(frozen=True)
class Stage:
    """What both stages have in common. All are trained with AdamW.

    Attributes:
        tokens: to train on at most, counted as full rows.
        max_epochs: passes over the text at most: a small text ends a stage before `tokens` do.
        length: tokens of a text that are seen at once; a longer text is cut. At most the teacher's positions.
        batch: rows of `length` tokens per forward pass; short texts share a row.
        accumulate: forward passes per optimizer step.
        learning_rate: at its peak.
        rate_width: the hidden size of the teachers that `learning_rate` is meant for; others get it times
            sqrt(rate_width / hidden size). None leaves it as it is, and so does overriding `learning_rate`.
        schedule: "cosine" or "constant".
        warmup: part of all steps over which the learning rate rises.
        weight_decay: of AdamW, for all that is trained.
        clip: the largest norm of a step's gradients, of each layer's in the transfer.
        validations: how often the held-out text is scored in the stage; the weights of the best one are kept.
    """

    tokens: int
    learning_rate: float
    rate_width: int | None = None
    max_epochs: float = 4.0
    length: int = 1024
    batch: int = 8
    accumulate: int = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    validations: int = 10

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("tokens", "batch", "accumulate", "validations"):
            _check(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("learning_rate", "max_epochs", "clip"):
            _check(self, name, getattr(self, name) > 0, "must be above 0")
        _check(self, "length", self.length >= 2, "must be at least 2")
        _check(self, "rate_width", self.rate_width is None or self.rate_width >= 1, "must be at least 1")
        _check(self, "weight_decay", self.weight_decay >= 0, "must not be negative")
        Schedule(self.schedule, warmup=self.warmup)

    def steps(self, rows: int) -> int:
        """Optimizer steps of the stage on a text of so many rows."""
        rows_to_see = min(self.tokens / self.length, self.max_epochs * rows)
        return max(1, math.ceil(rows_to_see / (min(self.batch, rows) * self.accumulate)))

    def rate(self, step: int, steps: int) -> float:
        return self.learning_rate * Schedule(self.schedule, warmup=self.warmup)(step, steps)


@dataclass(frozen=True)
class Transfer(Stage):
    """Each layer's mixer learns the teacher's attention, from the teacher's own inputs of that layer.

    Attributes:
        loss: "normalized_mse", ||y - y'||^2 / ||y||^2 of the heads' outputs, or "mse", their mean square times 1000.
        weights_cross_entropy: how much the cross entropy between the attention weights of both counts beside `loss`.
    """

    loss: Literal["normalized_mse", "mse", "none"] = "normalized_mse"
    weights_cross_entropy: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "weights_cross_entropy", self.weights_cross_entropy >= 0, "must not be negative")
        if self.loss == "none" and self.weights_cross_entropy == 0:
            raise UserError("transfer.loss: none leaves nothing to learn; raise transfer.weights_cross_entropy above 0")


@dataclass(frozen=True)
class Recover(Stage):
    """The whole student learns from text and from the teacher.

    Attributes:
        parameters: "lora", adapters of the attention projections, merged at the end, or "all".
        train_mixers: whether the mixers' own parameters are trained beside the adapters.
        rank, alpha: of the adapters.
        projections: which of q, k, v and o get one; a fused projection does where any of its parts would.
        next_token: how much the cross entropy of the text's next token counts.
        kl: how much the divergence from the teacher's distribution of the next token counts.
        replacement_steps: stepwise replacement: in step i of n the i-th of every n layers gets its mixer, those of
            earlier steps keep theirs, and the student learns for its part of the tokens with softmax in all others.
    """

    parameters: Literal["lora", "all"] = "lora"
    train_mixers: bool = False
    rank: int = 8
    alpha: float = 16.0
    projections: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
    next_token: float = 1.0
    kl: float = 0.0
    replacement_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "replacement_steps"):
            _check(self, name, getattr(self, name) >= 1, "must be at least 1")
        _check(self, "alpha", self.alpha > 0, "must be above 0")
        _check(self, "projections", len(self.projections) > 0, "must name one of q, k, v, o at least")
        for name in ("next_token", "kl"):
            _check(self, name, getattr(self, name) >= 0, "must not be negative")
        if self.next_token == self.kl == 0:
            raise UserError("recover.next_token and recover.kl are both 0, which leaves nothing to learn; raise one")

    @property
    def part(self) -> Recover:
        """What one of the `replacement_steps` has of the text."""
        parts = self.replacement_steps
        return dataclasses.replace(self, tokens=math.ceil(self.tokens / parts), max_epochs=self.max_epochs / parts)


@dataclass(frozen=True)
class LinearizeSpec:
    """A whole linearization.

    Attributes:
        mixer: name of the inner mixer that takes the place of softmax attention.
        options: its keyword arguments.
        keep_layers: layers that keep the teacher's softmax attention, counted from 0; negative ones from the last.
        keep_every: instead of naming them, n: the last of every n layers keeps it. Overriding `keep_layers` unsets it.
        match_norms: whether the mixers are scaled at first so that each head's output has the norm of the teacher's.
        transfer, recover: the stages; `None` leaves one out.
        self_tokens: of text that the teacher writes itself, to train on beside the given text: a small text is soon
            known by heart, and what the teacher does can be learnt from its own.
        val_fraction: part of the text that is held out, where no validation text is given.
        measure_tokens: held-out tokens that the controls are measured on, at most.
        seed: of the order of the text, of the adapters, and of what the mixers start with.
    """

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    keep_layers: tuple[int, ...] = ()
    keep_every: int | None = None
    match_norms: bool = False
    transfer: Transfer | None = None
    recover: Recover | None = None
    self_tokens: int = 0
    val_fraction: float = 0.1
    measure_tokens: int = 131_072
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "val_fraction", 0 < self.val_fraction < 1, "must be between 0 and 1")
        _check(self, "measure_tokens", self.measure_tokens >= 1, "must be at least 1")
        _check(self, "self_tokens", self.self_tokens >= 0, "must not be negative")
        _check(self, "seed", self.seed >= 0, "must not be negative")
        _check(self, "keep_every", self.keep_every is None or self.keep_every >= 1, "must be at least 1")
        if self.keep_layers and self.keep_every is not None:
            raise UserError("keep_layers and keep_every both say which layers keep their attention; leave out one")
        if self.options.get("window") == 0 and "window_kind" in self.options:
            raise UserError("options.window=0 leaves no window, and this preset needs one; give 1 or more, or hedgehog")

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages there are, in order."""
        named = {"transfer": self.transfer, "recover": self.recover}
        return {name: stage for name, stage in named.items() if stage is not None}

    @property
    def length(self) -> int:
        """Tokens of a text that are seen at once, in the stage that sees most."""
        return max((stage.length for stage in self.stages.values()), default=1024)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def override(self, values: dict[str, Any]) -> LinearizeSpec:
        """This spec with some values changed, by dotted names such as `transfer.learning_rate`.

        Another `mixer` has none of the options of the one before.
        """
        spec = self
        if values.get("mixer", self.mixer) != self.mixer:
            values = {"options": {}, **values}
        for stage in self.stages:
            if f"{stage}.learning_rate" in values:
                values = {f"{stage}.rate_width": None, **values}
        if "keep_layers" in values:
            values = {"keep_every": None, **values}
        for name, value in values.items():
            spec = _replace(spec, name, name.split("."), value)
        return spec

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearizeSpec:
        return _build(cls, values, "")

    @classmethod
    def load(cls, name: str | Path) -> LinearizeSpec:
        """A preset by name, or a YAML file."""
        path = Path(name)
        if not path.is_file():
            path = _presets_folder() / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"no preset or YAML file {str(name)!r}{suggest(str(name), presets())}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {one_line(error)}") from error
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from error


def presets() -> list[str]:
    return sorted(file.stem for file in _presets_folder().iterdir() if file.suffix == ".yaml")


def _presets_folder() -> Path:
    return Path(str(importlib.resources.files("lm_zoo.configs"))) / "linearize"


def _build(kind: type, values: Any, where: str) -> Any:
    """`kind` from a mapping; every key has to be one of its fields."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the spec'}: expected keys and their values, got {values!r}")
    known = {entry.name: entry for entry in fields(kind)}
    for name in values:
        if name not in known:
            full = f"{where}.{name}" if where else str(name)
            raise UserError(f"unknown key {full!r}{suggest(str(name), known)}")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{f'{where}.' if where else ''}{name} is missing")
    stages = {"transfer": Transfer, "recover": Recover} if kind is LinearizeSpec else {}
    built = {
        name: _build(stages[name], value, name) if name in stages and isinstance(value, dict) else value
        for name, value in values.items()
    }
    return kind(**built)


def _replace(spec: Any, full_name: str, path: list[str], value: Any) -> Any:
    name, *rest = path
    known = [entry.name for entry in fields(spec)]
    if name not in known:
        raise UserError(f"unknown key {full_name!r}{suggest(name, known)}")
    inner = getattr(spec, name)
    if name in FREE and rest:
        value = {**inner, ".".join(rest): value}
    elif rest:
        if not dataclasses.is_dataclass(inner):
            stage = " (the preset has no such stage)" if inner is None else ""
            raise UserError(f"{full_name!r} is no key of a spec{stage}")
        value = _replace(inner, full_name, rest, value)
    return dataclasses.replace(spec, **{name: value})


def _check(spec: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{_prefix(spec)}{name}={getattr(spec, name)} {rule}")


def _prefix(spec: Any) -> str:
    return "" if isinstance(spec, LinearizeSpec) else f"{type(spec).__name__.lower()}."


def _check_types(spec: Any) -> None:
    """Values as YAML gives them, brought to the declared types: whole numbers to floats, lists to tuples."""
    for name, hint in typing.get_type_hints(type(spec)).items():
        value = getattr(spec, name)
        try:
            object.__setattr__(spec, name, _coerce(value, hint))
        except TypeError as error:
            raise UserError(f"{_prefix(spec)}{name} must be {error}, got {value!r}") from None


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint`; TypeError, naming what was expected, where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, arguments[0])
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise TypeError(f"one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_coerce(item, arguments[0]) for item in value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3, with no dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (origin or hint) not in (int, float) and isinstance(value, origin or hint):
        return value
    kind = origin or hint
    raise TypeError(
        {int: "a whole number", float: "a number", bool: "true or false", dict: "keys and values"}.get(
            kind, f"a {kind.__name__}"
        )
    )
