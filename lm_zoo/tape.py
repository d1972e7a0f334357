"""What a CUDA graph is on a GPU, for a CPU: a function's operations, recorded once and replayed without its Python.

A decoding step of a small model takes as long as its calls. A tape has one call per operation: each writes to the
tensor that it made when it was recorded, so that views are made once, and modules, checks and shapes cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_zoo.packing import Products

UNREPEATABLE = (  # what such an operation gave would be replayed as a constant
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


class Tape:
    """The operations that `function(x)` runs: recording runs them once, and so does each call.

    The tensors that the function reads and writes are taken by their addresses: new values in them are seen, new
    tensors in their place are not. What it does besides, as counting in a Python number, is not repeated. Weights of
    `pack_weights` that take the same input are one product. What comes of parameters alone is computed again only when
    their version counters say that they changed.

    `output` is the tensor that the function returned, in which each call leaves its result. `refusal` is the name of an
    operation that cannot be replayed, where there was one; the recorded run is valid even so.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        self.input = x.clone()
        recorder = _TapeRecorder()
        with recorder:
            self.output = function(self.input)
        self.refusal = recorder.refusal
        self.settled, notes = recorder.split(recorder.notes)
        self.calls = [note.call for note in notes]

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.settled()
        for call in self.calls:
            call()
        return self.output


@dataclass(frozen=True)
class Note:
    """An operation: how to run it again into the same tensors, and the storages that it reads and makes."""

    call: Callable[[], object] | None  # `None` where there is nothing to run, as for a view
    read: set[int]
    made: set[int]  # none where it writes in place, or what it returns is a view


class Settled:
    """Calls that compute from parameters alone, for when those have changed."""

    def __init__(self, calls: list[Callable[[], object]], parameters: list[nn.Parameter]):
        self.calls, self.parameters = calls, parameters
        self.versions = [parameter._version for parameter in parameters]

    def __call__(self) -> None:
        versions = [parameter._version for parameter in self.parameters]
        if versions != self.versions:
            self.versions = versions
            for call in self.calls:
                call()


class Recorder(TorchDispatchMode):
    """Runs operations; `note(op, args, kwargs)`, which a subclass defines, also notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()  # storages that operations write to in place
        self.parameters: dict[int, nn.Parameter] = {}  # by their ids, all that were read
        self.refusal: str | None = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(tag in UNREPEATABLE for tag in op.tags) and not _without_dropout(op, args, kwargs):
            self.refusal = op.name()
        leaves = tree_leaves((args, kwargs))
        self.parameters |= {id(x): x for x in leaves if isinstance(x, nn.Parameter) and not x.is_inference()}
        return self.note(op, args, kwargs)

    def split(self, notes: list[Note]) -> tuple[Settled, list[Note]]:
        """What computes from nothing or from parameters alone, and the notes of all the rest."""
        constant = storages(list(self.parameters.values())) - self.written
        settled, rest, used = [], [], set()
        for note in notes:
            if note.read <= constant and not note.made & self.written:
                constant |= note.made
                used |= note.read
                settled += [note.call] * (note.call is not None)
            else:
                rest.append(note)
        return Settled(settled, [p for p in self.parameters.values() if storages(p) <= used]), rest


class _TapeRecorder(Recorder):
    """Notes how to run each operation again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.products = Products()
        self.rewrites = {torch.ops.aten.linear.default: self.products.linear, torch.ops.aten.rms_norm.default: rms_norm}

    def note(self, op, args: tuple, kwargs: dict):
        read = storages((args, kwargs))
        if op._schema.is_mutable:
            result = op(*args, **kwargs)
            self.written |= storages(result)
            self.products.forget(storages(result))
            function = op if None in tree_leaves(args) else binding(op)  # Python's index_put_ takes no None
            self.notes.append(Note(partial(function, *args, **kwargs), read, set()))
            return result
        if op in self.rewrites and (rewritten := self.rewrites[op](*args, **kwargs)) is not None:
            result, calls = rewritten
            self.notes += [Note(call, read, set()) for call in calls]
            return result
        result = op(*args, **kwargs)
        made = storages(result)
        if not made <= read:  # else a view, which stays what it is
            self.notes.append(Note(again(op, args, kwargs, result), read, made))
        return result


def storages(values: object) -> set[int]:
    """The addresses of the memory that tensors lie in."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, list[Callable]] | None:
    """x / sqrt(|x|^2 / D + eps) * weight and the calls that compute it, half as long as torch's own."""
    if len(shape) != 1 or weight is None or eps is None or x.dtype != weight.dtype:
        return None
    norm = x.new_empty(*x.shape[:-1], 1)
    eps, result = torch.full_like(norm, eps), torch.empty_like(x)
    calls = [
        partial(torch.linalg.vector_norm, x, 2, -1, True, out=norm),
        partial(torch.addcmul, eps, norm, norm, value=1 / shape[0], out=norm),
        partial(torch.rsqrt, norm, out=norm),
        partial(torch.mul, x, norm, out=result),
        partial(torch.mul, result, weight, out=result),
    ]
    for call in calls:
        call()
    return result, calls


def _without_dropout(op, args: tuple, kwargs: dict) -> bool:
    """Whether it is attention, which counts as random, but draws nothing."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "attention" in op.name() and given.get("dropout_p", 0.0) == 0.0


def again(op, args: tuple, kwargs: dict, result: object) -> Callable[[], object]:
    """A call that computes `op` into the tensors of `result`."""
    if isinstance(result, Tensor):
        for function in (binding(op), out_variant(op)):
            try:
                call = partial(function, *args, **kwargs, out=result)
                call()
            except (TypeError, RuntimeError):
                continue
            return call
    return partial(_copy_into, tree_leaves(result), op, args, kwargs)


def _copy_into(results: list[object], op, args: tuple, kwargs: dict) -> None:
    for result, new in zip(results, tree_leaves(op(*args, **kwargs)), strict=True):
        if isinstance(result, Tensor):
            result.copy_(new)


@cache
def binding(op) -> Callable:
    """Python's own function for an operation, where there is one: calling it costs half as much."""
    name = op._schema.name.split("::")[1]
    owner = torch.Tensor if op._schema.is_mutable else torch
    return getattr(owner, name, op)


@cache
def out_variant(op) -> Callable:
    """The overload that takes the same arguments and `out`; the operation itself where there is none."""
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        overload = getattr(op.overloadpacket, name)
        arguments = overload._schema.arguments
        given = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        if given == wanted and [argument.name for argument in arguments if argument.is_out] == ["out"]:
            return overload
    return op
