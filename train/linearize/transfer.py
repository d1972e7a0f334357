"""Attention transfer: every layer's mixer learns the teacher's attention, all layers in one forward pass.

The pass itself is the teacher's, without gradients. At each layer an observer gets q, k and v, computes what the
teacher's softmax makes of them and, with gradients, what the mixer does, calls backward for the difference, and hands
the teacher's output on. So each layer learns from the teacher's own inputs (teacher forcing), independently of the
others, and only one layer's activations are alive at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm_zoo.errors import UserError
from lm_zoo.linearized import HybridAttention, LinearizedForCausalLM, RegisteredMixer
from lm_zoo.linearized.inner import Context
from lm_zoo.linearized.interface import softmax
from lm_zoo.train.linearize.data import Batch, PackedRows
from lm_zoo.train.linearize.spec import LinearizeSpec, Transfer
from lm_zoo.train.linearize.weights import weights_cross_entropy

MSE_FACTOR = 1000.0  # as published: heads' outputs are small
TINY = 1e-30  # for a head whose mixer says nothing


class LayerLosses:
    """The observer: the loss of each replaced layer, and its gradients where a factor for them is given."""

    def __init__(self, options: Transfer, gradient_factor: float | None = None) -> None:
        self.options, self.gradient_factor = options, gradient_factor
        self.losses: dict[int, Tensor] = {}  # by layer

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        target = softmax(module, q, k, v, context)
        if module.mixer is not None:
            module.mixer.train(self.gradient_factor is not None)  # for its dropout of windows
            with torch.set_grad_enabled(self.gradient_factor is not None):
                loss = self._loss(module, q, k, v, context, target)
                if self.gradient_factor is not None:
                    (loss * self.gradient_factor).backward()
            self.losses[module.layer_idx] = loss.detach()
        return target

    def _loss(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context, target: Tensor) -> Tensor:
        options, loss = self.options, 0.0
        if options.loss != "none":
            output = module.mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)
            if options.loss == "mse":
                loss = MSE_FACTOR * (output.float() - target.float()).square().mean()
            else:
                loss = normalized_error(output, target)
        if options.weights_cross_entropy > 0:
            loss = loss + options.weights_cross_entropy * weights_cross_entropy(module, q, k, context)
        return loss


def normalized_error(output: Tensor, target: Tensor) -> Tensor:
    """||y - y'||^2 / ||y||^2, over all tokens and heads together."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()


def layer_losses(
    student: LinearizedForCausalLM, batch: Batch, options: Transfer, gradient_factor: float | None = None
) -> dict[int, Tensor]:
    """The loss of each replaced layer on a batch; adds its gradients, times the factor, to the mixers' parameters."""
    observer = LayerLosses(options, gradient_factor)
    with torch.no_grad(), student.observed(observer):
        student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    return observer.losses


def mean_losses(
    student: LinearizedForCausalLM, rows: PackedRows, options: Transfer, max_tokens: int
) -> dict[int, float]:
    """`layer_losses` on held-out text: the mean over its tokens, by layer."""
    sums: dict[int, float] = {}
    count = 0
    for batch in rows.batches(options.batch, max_tokens):
        tokens = batch.input_ids.shape[1]
        for layer, loss in layer_losses(student, batch.to(student.device), options).items():
            sums[layer] = sums.get(layer, 0.0) + float(loss) * tokens
        count += tokens
    return {layer: total / count for layer, total in sums.items()}


@torch.no_grad()
def match_norms(student: LinearizedForCausalLM, batch: Batch) -> None:
    """Scale each mixer so that the norm of each head's output is the teacher's on the batch, from the same inputs."""

    def match(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        target = softmax(module, q, k, v, context)
        if module.mixer is not None:
            output = module.mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)
            norms = [y.float().square().sum(dim=(0, 1, 3)).sqrt() for y in (target, output)]
            module.mixer.match_norm(norms[0] / norms[1].clamp_min(TINY))
        return target

    with student.observed(match):
        student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)


def mixer_parameters(student: LinearizedForCausalLM) -> dict[str, nn.Parameter]:
    """The parameters that the mixers bring along, by name."""
    return {name: value for name, value in student.named_parameters() if ".mixer." in name}


def by_layer(names: dict[str, nn.Parameter]) -> list[list[str]]:
    """The names, grouped by the layer that they belong to."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".mixer.")[0], []).append(name)
    return list(groups.values())


def check_mixers(student: LinearizedForCausalLM, spec: LinearizeSpec) -> None:
    """UserError where the mixers that were made cannot do what the spec wants of them before the recovery."""
    mixers = [module.mixer for module in student.attention_layers if module.mixer is not None]
    if spec.match_norms and not all(isinstance(mixer, RegisteredMixer) for mixer in mixers):
        raise UserError(f"match_norms: the mixer {spec.mixer!r} has no scale that could be set; set it to false")
    if spec.transfer is None:
        return
    if not mixer_parameters(student):
        raise UserError(
            f"the mixer {spec.mixer!r} has no parameters that attention transfer could train; "
            "leave the stage out (transfer: null)"
        )
    if spec.transfer.weights_cross_entropy > 0 and not all(isinstance(mixer, HybridAttention) for mixer in mixers):
        raise UserError(
            f"transfer.weights_cross_entropy: the mixer {spec.mixer!r} has no attention weights to compare; "
            "set it to 0, and transfer.loss to normalized_mse"
        )
