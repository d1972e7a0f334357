"""Weights laid out for decoding: those that multiply the same vector lie one after the other, for one product."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from lm_zoo.causal_lm import CausalLM

ROWS = 4  # up to so many, a product W x is quicker than x W^T
FEW = 2**17  # numbers of a matrix; with fewer, waking other threads takes longer than they save


@torch.no_grad()
def pack_weights(model: CausalLM) -> CausalLM:
    """Lay the weights of a model on a CPU out so that decoding reads them at the speed of the memory.

    The weights W_1 .. W_n `[O_i, K]` of linear layers that take the same input become views of one matrix `[O, K]`: W_i
    is some of its rows. Their values, names and shapes stay, and no second copy is kept. Weights on other devices, and
    of other dtypes than float32 and float64, are left alone. Returns the model.
    """
    parameters = {p.data_ptr(): p for p in model.parameters() if packable(p) and packed(p) is None}
    log = _ProductLog(parameters)
    cache = model.init_cache(1)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    training = model.training
    model.eval()
    with torch.inference_mode(), log:
        model(token, past_key_values=cache)
    model.train(training)
    for weights in log.groups():
        together, start = torch.cat([weight.data for weight in weights]), 0
        for weight in weights:
            weight.packed_rows = len(together)
            weight.data = together[start : start + len(weight)]
            start += len(weight)
    return model


class _ProductLog(TorchDispatchMode):
    """Which parameters are multiplied with the same tensor."""

    def __init__(self, parameters: dict[int, nn.Parameter]):
        super().__init__()
        self.parameters = parameters
        self.products: dict[tuple, tuple[Tensor, list[nn.Parameter]]] = {}  # the tensor is kept, and so its address

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.linear.default:
            x, weight = args[:2]
            parameter = self.parameters.pop(weight.data_ptr(), None)
            if parameter is not None:
                self.products.setdefault((x.data_ptr(), x.shape), (x, []))[1].append(parameter)
        return op(*args, **kwargs or {})

    def groups(self) -> list[list[nn.Parameter]]:
        return [weights for _, weights in self.products.values()]


def packed(weight: Tensor) -> Tensor | None:
    """The matrix `[O, K]` some rows of which are `weight`, where `pack_weights` made one and it is still there."""
    shape, size = (getattr(weight, "packed_rows", 0), weight.shape[-1]), weight.element_size()
    if math.prod(shape) * size != weight.untyped_storage().nbytes():
        return None
    return weight.as_strided(shape, (shape[1], 1), 0)


def unpacked(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own where it was a part of packed weights; tied ones stay tied."""
    own = {}
    for x in state_dict.values():
        key = x.data_ptr(), x.shape
        if key not in own:
            own[key] = x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
    return {name: own[x.data_ptr(), x.shape] for name, x in state_dict.items()}


def packable(weight: Tensor) -> bool:
    floats = weight.dtype in (torch.float32, torch.float64)
    return weight.device.type == "cpu" and floats and weight.dim() == 2 and weight.is_contiguous()


class Products:
    """The products with weights within one recording: one for all packed weights that take the same input."""

    def __init__(self) -> None:
        self.results: dict[tuple, Tensor] = {}  # of (input, packed weights)
        self.keys: dict[int, list[tuple]] = {}  # of the inputs in a storage

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, list[Callable]] | None:
        """W x + b and the calls that compute it, `None` where torch's own does that."""
        if not packable(weight) or not x.is_contiguous():
            return None
        whole, start = packed(weight), weight.storage_offset() // weight.shape[1]
        if whole is None:
            whole, start = weight, 0
        key = (x.data_ptr(), x.shape, whole.data_ptr())
        calls = []
        if key not in self.results:
            self.results[key], calls = _product(x.view(-1, x.shape[-1]), whole)
            self.keys.setdefault(x.untyped_storage().data_ptr(), []).append(key)
        result = self.results[key].narrow(1, start, len(weight)).view(*x.shape[:-1], -1)
        if bias is not None:
            product, result = result, torch.empty_like(result)
            calls.append(partial(torch.add, product, bias, out=result))
            calls[-1]()
        return result, calls

    def forget(self, storages: set[int]) -> None:
        """The tensors there have changed: products with them are no longer what they were."""
        for storage in storages:
            for key in self.keys.pop(storage, ()):
                del self.results[key]


def _product(x: Tensor, weight: Tensor) -> tuple[Tensor, list[Callable[[], object]]]:
    """x W^T of x `[M, K]` and W `[O, K]`, with the calls that compute it again.

    For a few rows, MKL's product runs on one thread; products with parts of W run on all, each on a part of its own.
    """
    rows, (columns, size) = len(x), weight.shape
    parts = math.gcd(columns, 2 * torch.get_num_threads()) if weight.numel() > FEW else 1
    weight = weight.view(parts, -1, size)
    result = x.new_empty(rows, columns)
    if rows <= ROWS:
        left, right = weight, x.t().expand(parts, size, rows)
        split = result.view(parts, -1, 1) if rows == 1 else x.new_empty(parts, columns // parts, rows)
        ordered = split.permute(2, 0, 1)
    else:
        left, right = x.expand(parts, rows, size), weight.mT
        split = x.new_empty(parts, rows, columns // parts)
        ordered = split.transpose(0, 1)
    calls = [partial(torch.bmm, left, right, out=split)]
    if rows > 1:
        calls.append(partial(result.view(ordered.shape).copy_, ordered))
    for call in calls:
        call()
    return result, calls
