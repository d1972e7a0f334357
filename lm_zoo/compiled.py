"""A tape of loops in C++, which torch's Inductor writes: a layer is one call, in which the threads meet a dozen times.

Inductor leaves products of matrices to libraries, and those read weights for a single vector at a fraction of the
memory's speed. Written as sums they become loops too, which read at all of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lm_zoo.tape import Note, Recorder, again, storages

ROWS = 8  # up to so many, a loop over a weight computes a product with all of them at once


class Compiled:
    """`lm_zoo.tape.Tape`, compiled: recording runs the operations once, and each call runs what was compiled of them.

    Functions of the same operations on tensors of the same shapes, such as the layers of a model, are compiled once in
    a process, and Inductor keeps on disk what it compiled.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        recorder = _GraphRecorder()
        with recorder:
            self.output = function(x)
        self.refusal = recorder.refusal
        if self.refusal is None:
            self.settled, notes = recorder.split(recorder.notes)
            module, (_, *self.inputs) = _graph(notes, x, self.output)
            self.run = _compile(module, [x, *self.inputs])

    def __call__(self, x: Tensor) -> Tensor:
        self.settled()
        return self.run(x, *self.inputs)[0]


def check_compiler() -> None:
    """Refuses where there is nothing to compile C++ with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compile=True needs a C++ compiler, and there is none: install g++, name yours in the environment variable "
            "CXX, or leave it out"
        ) from error


@dataclass(frozen=True)
class _Operation(Note):
    op: Callable
    args: tuple
    kwargs: dict
    result: object


class _GraphRecorder(Recorder):
    """Notes operations and their tensors as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[_Operation] = []

    def note(self, op, args: tuple, kwargs: dict):
        result = op(*args, **kwargs)
        if not storages(result):
            return result  # a number or a dtype, which is the same each time
        read, made = storages((args, kwargs)), storages(result)
        if op._schema.is_mutable:
            self.written |= made
        if op._schema.is_mutable or made <= read:
            self.notes.append(_Operation(None, read, set(), op, args, kwargs, result))
        else:
            self.notes.append(_Operation(again(op, args, kwargs, result), read, made, op, args, kwargs, result))
        return result


def _graph(notes: list[_Operation], x: Tensor, output: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The operations as a function, and the tensors to call it with: `x`, and those that came from elsewhere."""
    inputs = {id(x): x}
    made: set[int] = set()
    kept = []
    for note in notes:
        read = {id(leaf): leaf for leaf in tree_leaves((note.args, note.kwargs)) if isinstance(leaf, Tensor)}
        if note.op is torch.ops.aten.view_as_real.default and not read.keys() & made:
            continue  # Inductor knows no complex numbers: such a tensor comes in as real ones
        inputs |= {key: leaf for key, leaf in read.items() if key not in made}
        made |= {id(leaf) for leaf in tree_leaves(note.result)}
        kept.append(note)
    graph = fx.Graph()
    nodes = {key: graph.placeholder(f"x{number}") for number, key in enumerate(inputs)}

    def node(leaf: object) -> object:
        return nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf

    for note in kept:
        args, kwargs = tree_map(node, note.args), tree_map(node, note.kwargs)
        made_by = graph.call_function(LOOPS.get(note.op, note.op), args, kwargs)
        if isinstance(note.result, Tensor):
            nodes[id(note.result)] = made_by
        else:
            for number, part in enumerate(note.result):
                nodes[id(part)] = graph.call_function(operator.getitem, (made_by, number))
    graph.output((nodes[id(output)],))
    return fx.GraphModule({}, graph), list(inputs.values())


_known: dict[tuple, Callable] = {}  # what was compiled in this process


def _compile(module: fx.GraphModule, inputs: list[Tensor]) -> Callable:
    threads = torch.get_num_threads()
    key = module.code, threads, *((x.dtype, x.shape, x.stride()) for x in inputs)
    if key not in _known:
        options = {"cpp.threads": threads, "size_asserts": False}
        _known[key] = torch._inductor.compile(module, inputs, options=options)
    return _known[key]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b as sums, which one loop over W computes for all rows."""
    rows = x.flatten(0, -2)
    rows = rows.as_strided(rows.shape, rows.stride())  # which Inductor computes once, and not within the loop
    if len(rows) > ROWS:
        return F.linear(x, weight, bias)
    y = torch.stack([(weight * row).sum(dim=-1) for row in rows]).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def baddbmm(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta x + alpha left right as sums, where `left` is a row for each matrix of `right`."""
    if left.shape[1] > 1:
        return torch.baddbmm(x, left, right, beta=beta, alpha=alpha)
    y = (left.mT * right).sum(dim=1, keepdim=True) * alpha
    return y if beta == 0 else y + beta * x


LOOPS = {torch.ops.aten.linear.default: linear, torch.ops.aten.baddbmm.default: baddbmm}
