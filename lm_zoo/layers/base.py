"""What every mixer is: a module from [B, T, D] to [B, T, D], and the state that it carries from call to call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from lm_zoo.kernels import linear_attention, linear_attention_step
from lm_zoo.kernels.sequence_parallel import active_group
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.journal import Call, Journal, keep
from lm_zoo.modules.cut import Cut

FEW = 16  # rows in a row that take the recurrent step: fewer than a chunk, and the arithmetic of decoding


class LayerState:
    """What a layer remembers between calls: named tensors, the batch dimension first in every one of them.

    A layer writes into the tensors in place, so they keep their addresses. The caller owns the state and may reorder
    its rows, select some of them into a new state, or copy it. With gradients enabled, the written values carry their
    graph: gradients flow back through earlier calls until `detach_()`.

    After `begin()` the tokens that follow can be taken back, see `keep` and `record`.
    """

    journal: Journal | None = None  # of the tokens that can be taken back

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{type(self).__name__}({shapes})"

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, for all rows together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def writable(self, name: str) -> Tensor:
        """The tensor `name`, to be written in place."""
        tensor = self.tensors[name]
        if tensor.requires_grad and not torch.is_grad_enabled():
            tensor.detach_()  # an untracked write would leave the graph of the value that it replaces
        return tensor

    def write(self, name: str, value: Tensor) -> None:
        """Copy `value` into the tensor `name`, at its address."""
        self.writable(name).copy_(value)

    def begin(self) -> None:
        """From here on the tokens can be taken back."""
        self.journal = Journal()

    def record(
        self, names: str | tuple[str, ...], fold: Callable[..., object], *inputs: Tensor | None, micro_steps: int = 1
    ) -> None:
        """To be called by a layer before it writes the tensors `names`, where `journal` is not `None`.

        Args:
            names: tensors that one call of `fold` leads on; each of the state's belongs to one such group at most.
            fold: `fold(*inputs, state=state)` writes into `names` what is about to be written.
            inputs: what it takes, `[B, T, ...]`, or `None`, or of one dimension where it is the same for all tokens.
                They are kept, not copied.
            micro_steps: rows of T per token.
        """
        names = (names,) if isinstance(names, str) else names
        self.journal.note(self.tensors, Call(names, fold, inputs, micro_steps))

    def keep(self, counts: list[int], total: int) -> None:
        """Of the `total` tokens since `begin()`, keep the first `counts[n]` of row n; it ends the record."""
        journal, self.journal = self.journal, None
        if min(counts) < total:
            keep(self, journal, counts, total)

    def recount(self) -> None:
        """Learn anew what is known of the tensors on the host: they were written from elsewhere."""

    def reset(self) -> None:
        """Forget everything: as `init_state` made it."""
        self.detach_()
        for tensor in self.tensors.values():
            tensor.zero_()

    def reorder_(self, index: Tensor) -> None:
        """Row n becomes what row `index[n]` was; `index` is `[B]`, so the batch size and the addresses stay."""
        if index.shape != (self.batch_size,):
            raise ValueError(f"index must be [B] = [{self.batch_size}], got {list(index.shape)}; use select()")
        for name, tensor in self.tensors.items():
            self.write(name, tensor.index_select(0, index))

    def select(self, index: Tensor) -> LayerState:
        """A new state whose row n is a copy of row `index[n]`; any number of rows."""
        return type(self)({name: tensor.index_select(0, index) for name, tensor in self.tensors.items()})

    def put(self, row: int, other: LayerState) -> None:
        """Copy the one row of `other` into this row."""
        for name in self.tensors:
            self.writable(name)[row] = other[name][0]

    def clone(self) -> LayerState:
        return type(self)({name: tensor.clone() for name, tensor in self.tensors.items()})

    def holding(self, tensors: dict[str, Tensor]) -> LayerState:
        """A state of this kind of other tensors, with any number of rows."""
        return type(self)(tensors)

    def trim(self) -> LayerState:
        """The same without room to grow; the tensors are shared."""
        return self

    def detach_(self) -> LayerState:
        """Cut the graph: gradients no longer reach calls made before this."""
        for tensor in self.tensors.values():
            tensor.detach_()
        return self


class Mixer(nn.Module):
    """Base of all layers that mix along time.

        y = layer(x)                          training, [B, T, D] -> [B, T, D]
        y = layer(x, cu_seqlens=cu)           N documents packed along time, B = 1
        state = layer.init_state(batch_size)
        y = layer(x_prompt, state=state)      any number of calls of any length; the state is updated in place
        y = layer(x_token, state=state)       T = 1 without gradients takes the recurrent step

    Any split of a sequence into calls gives the result of one call. With `state` and `cu_seqlens` together the state
    has N rows and each document continues its own.
    """

    paper: ClassVar[str]
    equation: ClassVar[str]
    decay: ClassVar[str]
    update: ClassVar[str]
    _shared: tuple[nn.Module | None] = (None,)
    rank, ranks = 0, 1  # this one, and how many share the heads as `cut` says

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerState:
        """The state before the first token. `device` and `dtype` of the activations default to the parameters'."""
        raise NotImplementedError(f"{type(self).__name__} does not define init_state")

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def cut(self) -> Cut | None:
        """How ranks share the layer, each with a part of its heads; `None`: each of them computes all of it."""
        return None

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of what has all heads, or their channels, in its last dimension."""
        return x if self.ranks == 1 else x.chunk(self.ranks, dim=-1)[self.rank]

    def shared_over_depth(self, num_layers: int) -> nn.Module | None:
        """A new module for all layers of this kind in a model of `num_layers` to share, `None` if they need nothing."""
        return None

    def share(self, module: nn.Module) -> None:
        """Use the module that `shared_over_depth` made; the model owns it."""
        self._shared = (module,)  # nn.Module does not look into a tuple: the model alone registers and saves the module

    @property
    def shared(self) -> nn.Module | None:
        """The module given by `share`; a layer on its own has none."""
        return self._shared[0]

    def _placement(self, device, dtype) -> tuple[torch.device, torch.dtype]:
        if device is None or dtype is None:
            parameter = next(self.parameters())
            device, dtype = device or parameter.device, dtype or parameter.dtype
        return torch.device(device), dtype


def recurrent_state(batch_size: int, heads: int, key_size: int, value_size: int, device, dtype) -> Tensor:
    """A zero matrix-valued state `[B, HV, K, V]` in float32, or float64 for float64 activations."""
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros(batch_size, heads, key_size, value_size, device=device, dtype=dtype)


@along_time("v")
def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    micro_steps: int = 1,
    state: LayerState | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`linear_attention` that continues from `state["S"]` and leaves the final state there.

    A token may be `micro_steps` rows of q, k and v along time; `cu_seqlens` then counts rows.
    """
    if state is None:
        return linear_attention(q, k, v, log_decay, beta, scale=scale, cu_seqlens=cu_seqlens)[0]
    if state.journal is not None:
        again = functools.partial(recur, scale=scale, micro_steps=micro_steps, cu_seqlens=None)
        state.record("S", again, q, k, v, log_decay, beta, micro_steps=micro_steps)
    few = q.shape[1] == micro_steps or (q.shape[1] <= FEW and active_group() is None)
    if few and cu_seqlens is None and not torch.is_grad_enabled():
        return linear_attention_step(q, k, v, log_decay, beta, state.writable("S"), scale=scale)
    # With gradients the op saves its initial state, which the write below would overwrite: hand it a copy.
    initial = state["S"].clone() if torch.is_grad_enabled() else state["S"]
    o, final = linear_attention(
        q, k, v, log_decay, beta, scale=scale, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens
    )
    state.write("S", final)
    return o
