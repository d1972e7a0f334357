"""Tensor parallelism: the processes of a group read the same tokens, and share every block's matrices and its work.

    y = W f(V x) = sum over ranks of W[:, own] f_own(V[own] x)

What can be cut so, each module says itself (`Cut`): the MLP, and mixers whose heads do not meet, but for a norm. The
parameters are DTensors over the group; inside of such a module this rank's parts stand in for them, so that what is
computed there is plain. The module's input enters and its output leaves with one all-reduce each, the former of its
gradient. What all ranks hold gets its gradient summed over the group by FSDP2, which lies on top. The vocabulary is cut
as well: embeddings and output embeddings by torch's own styles, and `linear_cross_entropy` knows a shared matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.layers import Mixer
from lm_zoo.model import ZooForCausalLM
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.norm import RMSNorm


def cut_model(model: ZooForCausalLM, mesh: DeviceMesh) -> None:
    """Shares what can be shared of a model, which may be on the meta device, among the ranks of `mesh`."""
    users: dict[nn.Module, Mixer] = {block.mixer.shared: block.mixer for block in model.model.layers}
    for module in model.model.shared:
        if users[module].cut() is not None:  # its mixers take their part of what it makes
            _stand_in(module, _Parts(module, Cut(columns=()), mesh))
    for block in model.model.layers:
        for name, module in (("mixer", block.mixer), ("mlp", block.mlp)):
            if module is not None and module.cut() is not None:
                parallelize_module(block, mesh, {name: InParts(module.cut())})
    styles = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh, styles | {"lm_head": ColwiseParallel(use_local_output=False)})
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.full_tensor())
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


class InParts(ParallelStyle):
    """A module of which each rank computes what `cut` gives it."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        parts = _Parts(module, self.cut, mesh)
        if isinstance(module, Mixer):
            module.rank, module.ranks = mesh.get_local_rank(), mesh.size()
        for owner, name in _owners(module, self.cut.counts):
            count = getattr(owner, name)
            own = tuple(c // mesh.size() for c in count) if isinstance(count, tuple) else count // mesh.size()
            setattr(owner, name, own)
        for owner, name in _owners(module, self.cut.norms):
            norm = getattr(owner, name)
            norm.forward = functools.partial(_norm_of_all, norm, mesh)
        for owner, name in _owners(module, self.cut.sums):
            linear = getattr(owner, name)
            linear.forward = functools.partial(_sum_of_all, linear, mesh)
        _stand_in(module, parts)
        forward = module.forward
        module.forward = lambda x, **options: leave(forward(enter(x, mesh), **options), mesh)
        return module


class _Parts:
    """A module's parameters, made DTensors over the ranks of `mesh`, and in `in_place()` this rank's parts of them."""

    def __init__(self, module: nn.Module, cut: Cut, mesh: DeviceMesh) -> None:
        self._mesh, self._found = mesh, []
        for path, part in module.named_modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                placement, sizes = _place(f"{path}.{name}".removeprefix("."), cut)
                value = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
                part.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
                self._found.append((part, name, sizes))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """As attributes of the instances, which hide the parameters of their names from what runs in the block."""
        try:
            for part, name, sizes in self._found:
                part.__dict__[name] = self._own(part._parameters[name], sizes)
            yield
        finally:
            for part, name, _ in self._found:
                part.__dict__.pop(name, None)

    def _own(self, parameter: DTensor, sizes: tuple[int, ...]) -> Tensor:
        if parameter.placements != (Replicate(),):
            return parameter.to_local()
        whole = parameter.to_local(grad_placements=[Partial()])
        if not sizes:
            return whole
        rank, ranks = self._mesh.get_local_rank(), self._mesh.size()
        return torch.cat([section.chunk(ranks)[rank] for section in whole.split(sizes)])


def _stand_in(module: nn.Module, parts: _Parts) -> None:
    """In the forward pass of `module`, this rank's parts are its parameters."""
    forward = module.forward

    def run(*args: Any, **options: Any) -> Any:
        with parts.in_place():
            return forward(*args, **options)

    module.forward = run


def _place(parameter: str, cut: Cut) -> tuple[Placement, tuple[int, ...]]:
    """Where a parameter lies, and the sizes of its sections where it has any."""

    def named_in(names: Iterable[str]) -> str | None:
        return next((name for name in names if f"{parameter}.".startswith(f"{name}.")), None)

    if named_in(cut.columns):
        return Shard(0), ()
    if named_in((cut.row, *cut.sums)):
        return Shard(1), ()
    return Replicate(), tuple(cut.sections.get(named_in(cut.sections), ()))


def _owners(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose attributes these are, and the attributes' own names."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        yield module.get_submodule(owner), attribute


def enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, the same on all ranks, for what each does a part of: its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def leave(y: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' y, for what is the same on all."""
    return DTensor.from_local(y, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


def _sum_of_all(linear: nn.Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """`linear` of the channels of all ranks, for each to use."""
    return enter(leave(F.linear(x, linear.weight), mesh), mesh)


def _norm_of_all(norm: RMSNorm, mesh: DeviceMesh, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """`norm` over the channels of all ranks."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    squares = enter(leave(wide.square().sum(dim=-1, keepdim=True), mesh), mesh)
    y = wide * (squares / norm.size + norm.eps).rsqrt() * norm.weight.to(dtype)
    return (y if gate is None else y * F.silu(gate.to(dtype))).to(x.dtype)


def check_cuts(config: ZooConfig, ranks: int) -> None:
    """UserError for mixers and MLPs that so many ranks cannot share evenly."""
    for name, mixer in _mixers(config).items():
        if (cut := mixer.cut()) is not None:
            for owner, count in _owners(mixer, cut.counts):
                _check_even(ranks, getattr(owner, count), count, f" of mixers['{name}']")
            for parameter, value in mixer.named_parameters():
                placement, sizes = _place(parameter, cut)
                sizes = sizes if isinstance(placement, Replicate) else value.shape[placement.dim]
                _check_even(ranks, sizes, "size", f" of {parameter} of mixers['{name}']")
    _check_even(ranks, config.intermediate_size, "intermediate_size")


def check_vocabulary(config: ZooConfig, ranks: int) -> None:
    """The same for the vocabulary, which may be the tokenizer's."""
    _check_even(ranks, config.vocab_size, "vocab_size")


def describe_cuts(config: ZooConfig, ranks: int) -> str:
    """One line: what so many ranks share."""
    mixers = _mixers(config)
    cut, whole = ([name for name, mixer in mixers.items() if (mixer.cut() is None) == none] for none in (False, True))
    parts = ["the vocabulary", *["the MLPs"] * (config.intermediate_size > 0), *cut]
    line = f"parallel.tensor={ranks} cuts {', '.join(parts)}"
    return f"{line}; every process computes all of {', '.join(whole)}" if whole else line


def _mixers(config: ZooConfig) -> dict[str, Mixer]:
    with torch.device("meta"):
        return {name: config.build_mixer(name) for name in dict.fromkeys(config.pattern)}


def _check_even(ranks: int, value: int | tuple[int, ...], name: str, where: str = "") -> None:
    if any(number % ranks for number in (value if isinstance(value, tuple) else (value,))):
        line = f"parallel.tensor={ranks} does not divide {name}={value}{where}"
        raise UserError(f"{line}; give a divisor, or another model")
