"""One token at a time, for many steps: what a step does is recorded once, and then replayed without its Python."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_zoo.compiled import Compiled, check_compiler
from lm_zoo.kernels.sequence_parallel import active_group
from lm_zoo.tape import Tape

if TYPE_CHECKING:
    from lm_zoo.cache import ZooCache
    from lm_zoo.causal_lm import CausalLM

Part = Callable[[Tensor], Tensor]
WARM_UP = 4  # plain steps before the recording, in which kernels are compiled; a short text is never recorded


class DecodeStep:
    """A step of a model at fixed addresses: the next token of every row of a cache.

        step = DecodeStep(model, cache)     # cache: of any number of rows, which have read their prompts
        logits = step(ids)                  # [B, 1] -> [B, 1, V]; the cache takes in the tokens, as in a forward pass

    The first `WARM_UP` calls are plain forward passes. Then the step is recorded: on a GPU as CUDA graphs, elsewhere as
    tapes (`lm_zoo.tape`). Layers whose state grows, as that of softmax attention without a window does, run as they are
    between what is recorded. A recording holds for this cache and this number of rows: its tensors must be written in
    place, as `reorder_cache` does. New values of the parameters are seen, unless they are written through `data`; new
    parameters, and hooks, are not.

    `pack_weights(model)` first makes a step on a CPU a good deal quicker, and `compile` again so: the recording is then
    compiled (`lm_zoo.compiled`), which takes a C++ compiler and some seconds.
    """

    def __init__(self, model: CausalLM, cache: ZooCache, *, compile: bool = False):
        if model.training:
            raise ValueError("model must be in eval mode: call model.eval()")
        if compile:
            if model.device.type != "cpu":
                raise ValueError(f"compile=True is for models on a CPU, this one is on {model.device}: leave it out")
            check_compiler()
        self._compiles = compile
        self.model = model
        self.cache = cache
        self.armed = False  # whether `generate()` wants the next forward pass to be this step
        self._plain = WARM_UP
        self._states = list(cache.states)
        self._runs: list[Part] | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if ids.shape != (self.cache.batch_size, 1):
            raise ValueError(f"ids must be [B, 1] = [{self.cache.batch_size}, 1], got {list(ids.shape)}")
        if self.cache.states != self._states:
            raise ValueError("the cache has other states than at first: make a new DecodeStep for it")
        length = self.cache.length
        with torch.inference_mode():
            logits = self._step(ids)
        self.cache.length = length + 1
        return logits.clone()  # the recording's own tensor is overwritten by the next step

    def _step(self, x: Tensor) -> Tensor:
        if self._runs is not None:
            for run in self._runs:
                x = run(x)
            return x
        parts = self.model.decode_parts(self.cache)
        if self._plain > 0:
            self._plain -= 1
            for _, part in parts:
                x = part(x)
            return x
        record = CudaGraph if x.is_cuda else Tape
        if self._compiles:  # layers of a kind are then compiled once
            record = Compiled
        else:
            parts = [
                (fixed, _chain([run for _, run in group])) for fixed, group in groupby(parts, lambda part: part[0])
            ]
        runs = []
        for fixed, run in parts:
            if fixed:
                recording = record(run, x)
                if recording.refusal is None:
                    run = recording
                x = recording.output
            else:
                x = run(x)
            runs.append(run)
        self._runs = runs
        return x


class CudaGraph:
    """`Tape` on a GPU: the kernels of `function(x)`, which run once at the recording and again at each call."""

    refusal = None

    def __init__(self, function: Part, x: Tensor):
        self.input = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # which launches nothing
            self.output = function(self.input)
        self.graph.replay()

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def recordable(model: CausalLM, cache: ZooCache) -> bool:
    """Whether replaying does all that a step of `generate()` does: no hooks, no training, nothing to be noted."""
    return not (
        model.training
        or any(state.journal is not None for state in cache.states)
        or active_group() is not None
        or torch.is_autocast_enabled(model.device.type)
        or any(_has_hooks(module) for module in model.modules())
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _chain(parts: list[Part]) -> Part:
    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return run
