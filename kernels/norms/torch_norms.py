"""The norms in PyTorch. A decoding step is many small calls, so casts that would do nothing are left out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_torch(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight [* silu(gate)]"""
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if given != dtype or weight.dtype != dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    y = F.rms_norm(x, weight.shape, weight, eps)
    if gate is not None:
        y = y * F.silu(gate if gate.dtype == dtype else gate.to(dtype))
    return y if given == dtype else y.to(given)


def l2_norm_torch(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps)"""
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x if given == dtype else x.to(dtype)
    y = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)
    return y if given == dtype else y.to(given)
