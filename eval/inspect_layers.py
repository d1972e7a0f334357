"""What the layers of a model look at when it reads a text: matrices of attention, and how far back they reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_zoo.errors import UserError, one_line
from lm_zoo.eval.implicit_attention import of_call
from lm_zoo.layers.along_time import Mixing, watched
from lm_zoo.layers.base import Mixer
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.linearized.inner import Context
from lm_zoo.linearized.interface import softmax
from lm_zoo.model import ZooForCausalLM


@dataclass(frozen=True)
class LayerMap:
    """The implicit attention M of one layer, with every row of |M| as shares of 1: row t is what token t looks at.

    Attributes:
        layer, mixer: its number and its kind.
        unit: what has a matrix of its own, "head" or "channel".
        distance: how many tokens back each head looks, `[heads]`: sum_s |M_ts| (t - s) in these shares, mean over t.
        mean: the mean over the heads, `[T, T]`.
        heads: of the head that looks nearest, the median one and the farthest, `[T, T]`, by their numbers.
    """

    layer: int
    mixer: str
    unit: str
    distance: Tensor
    mean: Tensor
    heads: dict[int, Tensor]

    @classmethod
    def of(cls, layer: int, mixer: str, matrix: Tensor, unit: str = "head") -> LayerMap:
        """From M `[1, heads, T, n T]`; where a token has n values, as in DeltaProduct, their weights are added up."""
        weights = matrix[0].abs().float().cpu()
        weights = weights.unflatten(-1, (weights.shape[-2], -1)).sum(dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        token = torch.arange(weights.shape[-1])
        distance = (weights * (token[:, None] - token)).sum(dim=-1).mean(dim=-1)
        order = distance.argsort().tolist()
        shown = dict.fromkeys([order[0], order[len(order) // 2], order[-1]])
        return cls(layer, mixer, unit, distance, weights.mean(dim=0), {head: weights[head].clone() for head in shown})


@torch.no_grad()
def attention_maps(model: PreTrainedModel, ids: Tensor) -> list[LayerMap]:
    """Of every layer of a model that reads tokens `[1, T]`."""
    if isinstance(model, ZooForCausalLM):
        return _of_mixers(model, ids)
    if isinstance(model, LinearizedForCausalLM):
        return _of_inner_mixers(model, ids)
    return _of_softmax(model, ids)


def _of_mixers(model: ZooForCausalLM, ids: Tensor) -> list[LayerMap]:
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    calls: list[Mixing] = []
    with watched(calls):
        model(ids, logits_to_keep=1)
    maps = []
    for layer, (mixer, call) in enumerate(zip(mixers, calls, strict=True)):
        matrix, values, _ = of_call(call)
        maps.append(LayerMap.of(layer, type(mixer).__name__, matrix, "channel" if values.shape[-1] == 1 else "head"))
    return maps


def _of_inner_mixers(model: LinearizedForCausalLM, ids: Tensor) -> list[LayerMap]:
    maps: list[LayerMap] = []

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        def mix(v: Tensor) -> Tensor:
            if module.mixer is None:
                return softmax(module, q, k, v, context)
            return module.mixer(q, k, v, context=context, state=None, cu_seqlens=None)

        name = "softmax" if module.mixer is None else type(module.mixer).__name__
        attention = of_call(Mixing(mix, {"v": v}, "v", time=1))
        maps.append(LayerMap.of(len(maps), name, attention.matrix))
        return attention.output.transpose(1, 2)

    with model.observed(observe):
        model(ids, logits_to_keep=1)
    return maps


def _of_softmax(model: PreTrainedModel, ids: Tensor) -> list[LayerMap]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # the one that builds the matrix
        matrices = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a {type(model).__name__} shows no attention ({one_line(error)}); name another model"
        ) from error
    finally:
        model.set_attn_implementation(before)
    if not matrices or any(matrix is None for matrix in matrices):
        raise UserError(f"a {type(model).__name__} shows no attention; name another model")
    return [LayerMap.of(layer, "softmax", matrix) for layer, matrix in enumerate(matrices)]
