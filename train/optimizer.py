"""The optimizer of a run: AdamW, and Muon for the groups that ask for it, in one step that the device may call off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values end between 0.7 and 1.2
NEWTON_SCHULZ_STEPS = 5
ELEMENTS_AT_A_TIME = 2**26  # of the matrices that are orthogonalised together


class AdamWMuon(torch.optim.Optimizer):
    r"""AdamW (Loshchilov and Hutter 2017), by torch's fused step; with `muon=True` in a group, Muon (Jordan 2024).

        M <- mu M + (1 - mu) G                          W <- (1 - rate decay) W - rate 0.2 sqrt(max(m, n)) U
        U = orthogonalised(mu M + (1 - mu) G)           of matrices W, G, M: [m, n]

    The factor gives U the size of AdamW's updates (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves
    both. U comes from five Newton-Schulz iterations on all matrices of a shape together: in bfloat16 on a GPU, in
    the matrix's own precision on a CPU, where bfloat16 is no quicker. Of sharded matrices every process gathers the
    whole update and keeps its part.

    `torch.optim.Muon` goes matrix by matrix and cannot be told on the device to leave a step out, hence this one.

    Attributes:
        skip: a scalar tensor. Where it is 1, `step` changes neither parameters nor states, whatever the gradients are:
            a step is given up without the host waiting to hear of it.

    Args:
        groups: parameter groups; those with `muon=True` hold matrices only.
        lr, betas, weight_decay: as in `torch.optim.AdamW`.
        momentum: mu of Muon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum, "muon": False}
        super().__init__(groups, defaults | {"fused": True})  # which keeps step counts on the device when loaded
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {list(parameter.shape)}")
        self.skip: Tensor | None = None
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=lr, betas=betas, eps=1e-8, fused=True)
        self._adamw_defaults = self._adamw.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_adamw()
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        return loss

    def _step_adamw(self) -> None:
        """torch's own step over our groups and our state: it holds none itself."""
        groups = [group for group in self.param_groups if not group["muon"] and group["params"]]
        self._adamw.param_groups = [{**self._adamw_defaults, **group} for group in groups]
        self._adamw.state = self.state
        self._adamw.found_inf = None if self.skip is None else self.skip.float()
        self._adamw.step()

    def _step_muon(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for alike in _by_shape(parameters):
            keep = torch.ones((), device=alike[0].device) if self.skip is None else 1 - self.skip
            momenta = [self._momentum(parameter) for parameter in alike]
            gradients = [parameter.grad for parameter in alike]
            if self.skip is not None:  # 0 times a gradient that is not finite would not be 0
                gradients = [gradient.masked_fill(self.skip.bool(), 0.0) for gradient in gradients]
            weight = ((1 - group["momentum"]) * keep).to(alike[0].dtype)
            for momentum, gradient in zip(momenta, gradients, strict=True):
                momentum.add_((gradient - momentum) * weight)
            updates = [torch.lerp(g, m, group["momentum"]) for g, m in zip(gradients, momenta, strict=True)]
            rows, columns = alike[0].shape
            rate = group["lr"] * keep
            for parameter, update in zip(alike, orthogonalised(updates), strict=True):
                parameter.mul_((1 - rate * group["weight_decay"]).to(parameter.dtype))
                parameter.sub_(update * (rate * 0.2 * max(rows, columns) ** 0.5).to(parameter.dtype))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """The matrices with all their singular values brought near 1; sharded ones as they were sharded."""
    whole = torch.stack([update.full_tensor() if isinstance(update, DTensor) else update for update in updates])
    product_dtype = torch.bfloat16 if whole.is_cuda and whole.dtype == torch.float32 else whole.dtype
    x = whole.to(product_dtype)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    a, b, c = NEWTON_SCHULZ
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result = wide if x.shape[-2] <= x.shape[-1] else wide.mT
    return [
        distribute_tensor(part, update.device_mesh, update.placements, src_data_rank=None)
        if isinstance(update, DTensor)
        else part
        for part, update in zip(result.to(whole.dtype).unbind(), updates, strict=True)
    ]


def _by_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, dtype and device together, so many as ELEMENTS_AT_A_TIME allows."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for (shape, *_), alike in kinds.items():
        count = max(1, ELEMENTS_AT_A_TIME // shape.numel())
        for start in range(0, len(alike), count):
            yield alike[start : start + count]
