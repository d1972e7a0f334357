"""Gradients of all parameters together: their norm, right also across shards, and their scaling."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, a scalar; of sharded ones, over all shards."""
    norms = [get_total_norm(alike) for alike in by_mesh(gradients)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are not sharded, and those sharded over each mesh: what tensor parallelism cuts lies on another one.

    Most operations on lists of tensors take those of one kind only. In the same order in all processes.
    """
    kinds: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(kinds.values())


def scale_gradients(parameters: list[nn.Parameter], *, weight: Tensor, clip_norm: float | None) -> Tensor:
    """Multiplies the gradients by `weight`, and so that their norm then does not exceed `clip_norm`.

    Returns the norm before clipping. In one pass over the gradients, without waiting for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients)
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32)) * weight
    clip = 1.0 if not clip_norm else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for alike in by_mesh(gradients):
        torch._foreach_mul_(alike, (weight * clip).to(norm.dtype))
    return norm
