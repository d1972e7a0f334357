"""torch.compile, block by block: blocks that are alike share a graph, and the model stays what it is."""

from __future__ import annotations

import torch

from lm_zoo.errors import UserError
from lm_zoo.model import ZooForCausalLM

GRAPHS_PER_BLOCK = 8  # where no two blocks are alike: training and validation, some lengths of the text


def check_backend(backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"model.compile={backend} is no backend of torch.compile; choose one of {', '.join(known)}")


def compile_blocks(model: ZooForCausalLM, backend: str, *, whole: bool) -> None:
    """Each block is compiled when it is first called; parameters keep their names. To be called before sharding.

    `whole`: a block must be one graph, without breaks; otherwise it is an error.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK * len(model.model.layers))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    config.optimize_ddp = False  # it cuts graphs where gradients are sent off; blocks are cuts enough
    for block in model.model.layers:
        block.compile(backend=backend, fullgraph=whole)


def any_size(x: torch.Tensor | None) -> None:
    """The first dimension of an input of the blocks differs from batch to batch: one graph is to serve them all."""
    if x is not None:
        torch._dynamo.maybe_mark_dynamic(x, 0)


def lacks_compiler(error: RuntimeError) -> bool:
    """Whether this is how inductor ends where there is no C++ compiler, which it needs on a CPU."""
    return "C++ compiler" in str(error)
