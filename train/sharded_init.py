"""A model that is sharded from the start: no process ever holds more than one whole block of it.

The parameters are, number by number, those that the seed gives in one process. There, a model draws its parameters
twice: layer by layer when it is built, and again when all of it stands (`post_init`), which is what counts. Here each
block goes to the meta device as soon as it is built. Then the second round of draws is done again from where the random
generator stood, block by block, and every process keeps its part of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.nn.modules.module import register_module_module_registration_hook

from lm_zoo.config import ZooConfig
from lm_zoo.model import Block, ZooForCausalLM, ZooModel


def sharded_model(config: ZooConfig, shard: Callable[[ZooForCausalLM], None], device: torch.device) -> ZooForCausalLM:
    """A new model on `device`, whose parameters `shard` turned into DTensors."""
    random = torch.cuda if device.type == "cuda" else torch
    with device, _on_meta(random) as before_post_init:
        model = ZooForCausalLM(config)
    units = list(_units(model))
    blanks = copy.deepcopy(units)  # on the meta device, so of no size
    shard(model)
    model.to_empty(device=device)
    random.set_rng_state(before_post_init[-1])
    done: set[Tensor] = set()
    for unit, blank in zip(units, blanks, strict=True):
        blank.to_empty(device=device)
        blank.apply(model._init_weights)
        for parameter, value in zip(unit.parameters(), blank.parameters(), strict=True):
            if parameter not in done:  # of tied ones, the first draw counts
                _keep_part(parameter, value)
            done.add(parameter)
        blank.to("meta")
    return model


@contextmanager
def _on_meta(random: ModuleType) -> Iterator[list[Tensor]]:
    """In the block, parts of a model go to the meta device when they are done; gives the generator's states then."""
    states: list[Tensor] = []

    def hook(parent: nn.Module, name: str, part: nn.Module) -> None:
        if isinstance(part, Block) or isinstance(parent, ZooModel | ZooForCausalLM):
            part.to("meta")
            states.append(random.get_rng_state())

    handle = register_module_module_registration_hook(hook)
    try:
        yield states
    finally:
        handle.remove()


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks, and what lies outside of them, in the order in which `post_init` goes through them."""
    for child in module.children():
        if isinstance(child, Block) or not any(True for _ in child.children()):
            yield child
        else:
            yield from _units(child)


@torch.no_grad()
def _keep_part(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
