"""The lower bounds of HGRN's forget gates, which rise over the depth of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.modules.init import fill_


class LowerBounds(nn.Module):
    r"""gamma_l = sum_{0 < i <= l} softmax_i(Gamma), `[D]`, of layer l (Qin et al. 2023, arXiv 2311.04823).

    Gamma `[L, D]` is learned and one for all L layers, so that the bounds rise from 0 in the first layer and stay below
    1. At first it is 0: the bounds rise evenly.
    """

    def __init__(self, num_layers: int, size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_layers, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_(self.logits, torch.zeros_like(self.logits))

    def forward(self, layer_index: int) -> Tensor:
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        return self.logits.to(dtype).softmax(dim=0)[1 : layer_index + 1].sum(dim=0)


def bounded_gate(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""log f and 1 - f of the forget gate f = gamma + (1 - gamma) sigmoid(z), in float32 at least.

    gamma is 0 if not given. 1 - f keeps its digits where f is nearly 1, and log f where f is nearly 0. Above one half
    log f is made from 1 - f: the other way rounds to as far as 6e-8 above 0, which no decay may be.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if bound is None:
        return F.logsigmoid(z), torch.sigmoid(-z)
    bound = bound.to(z)
    tiny = torch.finfo(z.dtype).tiny  # in place of 0, whose logarithm would have a gradient of NaN
    low, rest = bound.clamp(min=tiny).log(), (1 - bound).clamp(min=tiny)
    shrink = rest * torch.sigmoid(-z)
    log_f = torch.logaddexp(low, rest.log() + F.logsigmoid(z))
    return torch.where(shrink < 0.5, torch.log1p(-shrink.clamp(max=0.5)), log_f), shrink
