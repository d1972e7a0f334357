"""Softmax attention, and the keys and values that it keeps: all, or those of the last `window` tokens in a ring.

Layout `[B, heads, T, K]`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.layers.base import LayerState
from lm_zoo.modules.attention import attend, attend_window


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: "GrowingKeyValues | WindowKeyValues | None" = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention, continued from a state, within packed documents.

    Args:
        q: `[B, H, T, K]`.
        k, v: `[B, HKV, T, K]`, H a multiple of HKV.
        window: how many tokens each query sees, itself included; all before it if not given.
        scale: factor of q . k; K^{-1/2} if not given.
        state: of `key_values`, with the same window; takes in the keys and values.
        cu_seqlens: `[N + 1]` borders of N documents packed along time; B = 1, and the state has N rows.
    """
    if cu_seqlens is None:
        if state is not None:
            return state.attend(q, k, v, scale)
        return attend(q, k, v, scale=scale) if window is None else attend_window(q, k, v, window, scale=scale)
    if torch.compiler.is_compiling() and state is None:
        return attend(q, k, v, _document_mask(q.shape[2], window, cu_seqlens), scale)
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, q.shape[2])
    outputs = []  # document by document, so that no work goes into pairs of tokens from different ones
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        row = None if state is None else state.select(cu_seqlens.new_tensor([n]))
        document = (x[:, :, start:end] for x in (q, k, v))
        outputs.append(softmax_attention(*document, window=window, scale=scale, state=row))
        if row is not None:
            state.put(n, row)
    return torch.cat(outputs, dim=2)


def _document_mask(length: int, window: int | None, cu_seqlens: Tensor) -> Tensor:
    """Who sees whom, `[1, 1, T, T]`: for torch.compile, which cannot loop over borders that it does not know."""
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True)
    distance = token[:, None] - token
    mask = (document[:, None] == document) & (distance >= 0)
    return (mask if window is None else mask & (distance < window))[None, None]


def key_values(batch_size: int, heads: int, size: int, window: int | None, device, dtype) -> LayerState:
    """The empty state of `heads` heads of keys and values, K = `size`: of the last `window` tokens, or of all."""
    shape = (batch_size, heads, window or 0, size)
    tensors = {
        "keys": torch.zeros(shape, device=device, dtype=dtype),
        "values": torch.zeros(shape, device=device, dtype=dtype),
        "position": torch.zeros(batch_size, dtype=torch.int64, device=device),
    }
    return WindowKeyValues(tensors) if window else GrowingKeyValues(tensors)


class GrowingKeyValues(LayerState):
    """Every key and value, `[B, HKV, slots, K]`: token t of a row is in slot t.

    When the slots run out there come a quarter more, so that copying stays linear in the length. `used` and `ragged`
    are known on the host: no decoding step waits for the device.
    """

    BLOCK = 64

    def __init__(self, tensors: dict[str, Tensor], used: int = 0, ragged: bool = False):
        super().__init__(tensors)
        self.used = used  # slots taken in the fullest row
        self.ragged = ragged  # whether rows differ in length

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Take in the keys and values of T new tokens and let their queries look at all so far."""
        start, end = self.used, self.used + k.shape[2]
        self._reserve(end)
        keys, values, position = self.writable("keys"), self.writable("values"), self["position"]
        if self.ragged:
            steps = torch.arange(end, device=k.device)
            slots = position[:, None] + steps[: k.shape[2]]  # [B, T]
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
            mask = (steps <= slots[..., None])[:, None]  # [B, 1, T, end]
        else:
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            mask = None
        position += k.shape[2]
        self.used = end
        keys, values = keys[:, :, :end], values[:, :, :end]
        if torch.is_grad_enabled():  # the backward pass needs them as they are now, and the next call writes into them
            keys, values = keys.clone(), values.clone()
        return attend(q, keys, values, mask, scale)

    def select(self, index: Tensor) -> "GrowingKeyValues":
        state = super().select(index)
        state._recount()
        return state

    def put(self, row: int, other: LayerState) -> None:
        slots = other["keys"].shape[2]
        self._reserve(slots)
        for name in ("keys", "values"):
            self.writable(name)[row, :, :slots] = other[name][0]
        self["position"][row] = other["position"][0]
        self._recount()

    def clone(self) -> "GrowingKeyValues":
        return type(self)(super().clone().tensors, self.used, self.ragged)

    def reset(self) -> None:
        super().reset()
        self.used, self.ragged = 0, False

    def _recount(self) -> None:
        lengths = self["position"].tolist()
        self.used, self.ragged = max(lengths), len(set(lengths)) > 1

    def _reserve(self, slots: int) -> None:
        have = self["keys"].shape[2]
        if slots > have:
            want = -(-max(slots, have + have // 4) // self.BLOCK) * self.BLOCK
            for name in ("keys", "values"):  # zeros, since a masked slot must not hold NaN
                self.tensors[name] = F.pad(self[name], (0, 0, 0, want - have))


class WindowKeyValues(LayerState):
    """The last `window` keys and values, `[B, HKV, window, K]`: token t of a row is in slot t mod window."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Take in the keys and values of T new tokens and let each query look at the last `window`, itself included."""
        keys, values, position = self.writable("keys"), self.writable("values"), self["position"]
        window, length = keys.shape[2], k.shape[2]
        slots = torch.arange(window, device=k.device)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        if length == 1 and not torch.is_grad_enabled():
            self._store(keys, values, k, v, rows, (position % window)[:, None])
            o = attend(q, keys, values, (slots <= position[:, None])[:, None, None], scale)
            position += 1
            return o
        oldest_first = (position[:, None] + slots) % window  # [B, window]
        past = (keys[rows, :, oldest_first].transpose(1, 2), values[rows, :, oldest_first].transpose(1, 2), position)
        o = attend_window(q, k, v, window, past, scale)
        kept = min(length, window)
        slots = (position[:, None] + length - kept + slots[:kept]) % window
        self._store(keys, values, k[:, :, length - kept :], v[:, :, length - kept :], rows, slots)
        position += length
        return o

    @staticmethod
    def _store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor) -> None:
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
