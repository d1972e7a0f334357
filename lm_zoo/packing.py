"""Weights laid out for decoding: those that multiply the same vector lie side by side, and one product reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from lm_zoo.causal_lm import CausalLM

ROWS = 4  # up to so many, a product takes as long as reading the weights


@torch.no_grad()
def pack_weights(model: CausalLM) -> CausalLM:
    """Lay the weights of a model on a CPU out so that decoding reads them at the speed of the memory.

    The weights W_1 .. W_n `[O_i, K]` of linear layers that take the same input become views of one matrix `[K, O]`:
    W_i is some of its columns, transposed. Their values, names and shapes stay, and no second copy is kept. Weights on
    other devices, and of other dtypes than float32 and float64, are left alone. Returns the model.
    """
    parameters = {p.data_ptr(): p for p in model.parameters() if p.dim() == 2 and p.is_contiguous()}
    log = _ProductLog(parameters)
    cache = model.init_cache(1)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    training = model.training
    model.eval()
    with torch.inference_mode(), log:
        model(token, past_key_values=cache)
    model.train(training)
    for weights in log.groups():
        packed = torch.cat([weight.data for weight in weights]).t().contiguous()
        start = 0
        for weight in weights:
            end = start + weight.shape[0]
            weight.data = packed[:, start:end].t()
            start = end
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
            if parameter is not None and packable(parameter):
                self.products.setdefault((x.data_ptr(), x.shape), (x, []))[1].append(parameter)
        return op(*args, **kwargs or {})

    def groups(self) -> list[list[nn.Parameter]]:
        return [weights for _, weights in self.products.values()]


def unpacked(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own where it was a part of packed weights; tied ones stay tied."""
    own = {}
    return {name: own.setdefault((x.data_ptr(), x.shape), x.contiguous()) for name, x in state_dict.items()}


def packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


class Products:
    """The products of packed weights within one recording: one for all that take the same input."""

    def __init__(self) -> None:
        self.results: dict[tuple, Tensor] = {}  # of (input, packed weights)
        self.keys: dict[int, list[tuple]] = {}  # of the inputs in a storage

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, list[Callable]] | None:
        """W x + b and the calls that compute it, `None` where the weight is not packed."""
        if not packable(weight) or weight.stride(0) != 1 or not x.is_contiguous():
            return None
        size, columns = weight.shape[1], weight.stride(1)
        key = (x.data_ptr(), x.shape, weight.untyped_storage().data_ptr())
        calls = []
        if key not in self.results:
            packed = weight.as_strided((size, columns), (columns, 1), 0)
            self.results[key], calls = _product(x.view(-1, size), packed)
            self.keys.setdefault(x.untyped_storage().data_ptr(), []).append(key)
        result = self.results[key].narrow(1, weight.storage_offset(), weight.shape[0]).view(*x.shape[:-1], -1)
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


def _product(x: Tensor, packed: Tensor) -> tuple[Tensor, list[Callable[[], object]]]:
    """x W of x `[M, K]` and W `[K, O]`, with the calls that compute it again.

    For a row or two, MKL's product runs on one thread; a sum over parts of K, each a product of its own, runs on all.
    """
    rows, size = x.shape
    result = x.new_empty(rows, packed.shape[1])
    parts = 1
    while rows <= ROWS and parts < 2 * torch.get_num_threads() and size % (2 * parts) == 0 and size > 128 * parts:
        parts *= 2
    if parts == 1:
        calls = [partial(torch.mm, x, packed, out=result)]
    else:
        split = x.new_empty(parts, rows, packed.shape[1])
        left = x.view(rows, parts, -1).transpose(0, 1)
        right = packed.view(parts, -1, packed.shape[1])
        calls = [partial(torch.bmm, left, right, out=split), partial(torch.sum, split, 0, out=result)]
    for call in calls:
        call()
    return result, calls
