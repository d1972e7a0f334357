"""Softmax attention, and the keys and values that it keeps: all, or those of the last `window` tokens in a ring.

Layout `[B, heads, T, K]`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.kernels.sequence_parallel import Segment, SequenceGroup, active_group, alone, gather_tokens, tokens_before
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState
from lm_zoo.modules.attention import attend, attend_window


@along_time("v", time=2)
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
    if (group := active_group()) is not None:
        return _attend_segment(q, k, v, window, scale, state, cu_seqlens, group)
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


@torch.compiler.disable
def _attend_segment(q, k, v, window, scale, state, cu_seqlens, group: SequenceGroup) -> Tensor:
    """The same for a segment: its queries look at the keys of the segments before as well, which are gathered.

    A window takes no more of them than it sees. With a state, which takes in all keys, every rank computes all outputs.
    """
    length = q.shape[2]
    segment = Segment(group, length, cu_seqlens, q.device)
    if state is not None:
        q, k, v = (gather_tokens(x, 2, group) for x in (q, k, v))
        with alone():
            o = softmax_attention(q, k, v, window=window, scale=scale, state=state, cu_seqlens=cu_seqlens)
        return group.segment(o, dim=2)
    pairs, reach = torch.cat([k, v], dim=-1), segment.offset
    if window is None:
        pairs = gather_tokens(pairs, 2, group)[:, :, : segment.offset + length]
    else:
        window = min(window, group.size * length)
        before = tokens_before(pairs.transpose(1, 2).contiguous(), window, group).transpose(1, 2)
        pairs, reach = torch.cat([before, pairs], dim=2), window
    k, v = pairs.split((k.shape[-1], v.shape[-1]), dim=-1)
    documents = [(-segment.offset, length)]  # start and end of each, counted from the first token here
    if cu_seqlens is not None:
        documents = [(a - segment.offset, b - segment.offset) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    outputs = []
    for start, end in documents:
        first, end = max(start, 0), min(end, length)
        if first >= end:
            continue
        seen = slice(reach + max(start, -reach), reach + end)
        if window is None:
            outputs.append(attend(q[:, :, first:end], k[:, :, seen], v[:, :, seen], scale=scale))
            continue
        past = slice(first, first + window)  # the `window` keys before, of which as many count as the document has
        count = torch.full((1,), min(first - start, window), device=q.device)
        new = slice(reach + first, reach + end)
        past = (k[:, :, past], v[:, :, past], count)
        outputs.append(attend_window(q[:, :, first:end], k[:, :, new], v[:, :, new], window, past, scale))
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
        state.recount()
        return state

    def put(self, row: int, other: LayerState) -> None:
        slots = other["keys"].shape[2]
        self._reserve(slots)
        for name in ("keys", "values"):
            self.writable(name)[row, :, :slots] = other[name][0]
        self["position"][row] = other["position"][0]
        self.recount()

    def clone(self) -> "GrowingKeyValues":
        return type(self)(super().clone().tensors, self.used, self.ragged)

    def holding(self, tensors: dict[str, Tensor]) -> "GrowingKeyValues":
        state = super().holding(tensors)
        state.recount()
        return state

    def trim(self) -> "GrowingKeyValues":
        slots = {name: self[name][:, :, : self.used] for name in ("keys", "values")}
        return type(self)({**self.tensors, **slots}, self.used, self.ragged)

    def reset(self) -> None:
        super().reset()
        self.used, self.ragged = 0, False

    def begin(self) -> None:
        """Nothing to note: where a row ends says which keys and values it has."""

    def keep(self, counts: list[int], total: int) -> None:
        if min(counts) < total:
            self["position"].sub_(total - self["position"].new_tensor(counts))
            self.recount()

    def recount(self) -> None:
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
        window = keys.shape[2]
        new = k.transpose(1, 2), v.transpose(1, 2)
        if self.journal is not None:
            self.record(("keys", "values", "position"), take_in, *new)
        slots = torch.arange(window, device=k.device)
        if k.shape[2] == 1 and not torch.is_grad_enabled():
            take_in(*new, state=self)
            return attend(q, keys, values, (slots < position[:, None])[:, None, None], scale)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        oldest_first = (position[:, None] + slots) % window  # [B, window]
        past = (keys[rows, :, oldest_first].transpose(1, 2), values[rows, :, oldest_first].transpose(1, 2), position)
        o = attend_window(q, k, v, window, past, scale)
        take_in(*new, state=self)
        return o


def take_in(k: Tensor, v: Tensor, *, state: LayerState) -> None:
    """Put new keys and values `[B, T, HKV, K]` in the place of the oldest of a `WindowKeyValues`."""
    keys, values, position = state.writable("keys"), state.writable("values"), state["position"]
    window, length = keys.shape[2], k.shape[1]
    kept = min(length, window)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    slots = (position[:, None] + torch.arange(length - kept, length, device=k.device)) % window
    keys[rows, :, slots] = k[:, length - kept :].to(keys.dtype)
    values[rows, :, slots] = v[:, length - kept :].to(values.dtype)
    position += length
