"""Gradients of all parameters together: their norm, right also across shards, and their scaling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, a scalar; of sharded ones, over all shards."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [get_total_norm(whole)] if whole else []
    meshes = {gradient.device_mesh for gradient in sharded}  # tensor parallel parts may lie on another one
    norms += [get_total_norm([g for g in sharded if g.device_mesh == mesh]).full_tensor() for mesh in meshes]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def scale_gradients(parameters: list[nn.Parameter], *, weight: Tensor, clip_norm: float | None) -> Tensor:
    """Multiplies the gradients by `weight`, and so that their norm then does not exceed `clip_norm`.

    Returns the norm before clipping. In one pass over the gradients, without waiting for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients)
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32)) * weight
    clip = 1.0 if not clip_norm else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, (weight * clip).to(norm.dtype))
    return norm
