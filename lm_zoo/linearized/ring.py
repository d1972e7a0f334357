"""The state of an inner mixer with a window: a ring of the last keys and values beside a sum over all older ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_zoo.layers.base import LayerState


class RingState(LayerState):
    """The last `slots` keys and values of each row, and what else the mixer remembers.

        keys, values    [B, HKV, slots, D]    token t of a row is in slot t mod slots
        position        [B]                   tokens that each row has seen
        S               [B, HS, F, V]         float32

    `seen` is `position` on the host: rows may differ in length, and no decoding step waits for the device to say so.
    """

    def __init__(self, tensors: dict[str, Tensor], seen: list[int] | None = None):
        super().__init__(tensors)
        self.seen = tensors["position"].tolist() if seen is None else seen

    @classmethod
    def empty(cls, batch_size: int, heads: int, slots: int, size: int, S: Tensor, dtype: torch.dtype) -> RingState:
        shape = (batch_size, heads, slots, size)
        tensors = {
            "keys": torch.zeros(shape, device=S.device, dtype=dtype),
            "values": torch.zeros(shape, device=S.device, dtype=dtype),
            "position": torch.zeros(batch_size, dtype=torch.int64, device=S.device),
            "S": S,
        }
        return cls(tensors, [0] * batch_size)

    @property
    def slots(self) -> int:
        return self["keys"].shape[2]

    def clone(self) -> RingState:
        return type(self)(super().clone().tensors, list(self.seen))

    def reset(self) -> None:
        super().reset()
        self.seen = [0] * self.batch_size

    def reorder_(self, index: Tensor) -> None:
        super().reorder_(index)
        self.recount()

    def recount(self) -> None:
        self.seen = self["position"].tolist()

    def put(self, row: int, other: LayerState) -> None:
        super().put(row, other)
        self.seen[row] = other.seen[0]

    def extend(self, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        """Take in the new tokens of all rows, `[tokens, HKV, D]`, `lengths[n]` of them for row n."""
        row, offset = token_places(lengths)
        count, seen = torch.tensor(lengths), torch.tensor(self.seen)
        kept = (offset >= count[row] - self.slots).nonzero().squeeze(1)  # later ones would overwrite the others
        row, slot = row[kept], (seen[row] + offset)[kept] % self.slots
        device = k.device
        kept, row, slot = kept.to(device), row.to(device), slot.to(device)
        for name, x in (("keys", k), ("values", v)):
            tensor = self.writable(name)
            tensor[row, :, slot] = x[kept].to(tensor.dtype)
        self._advance(lengths)

    def swap(self, k: Tensor, v: Tensor) -> None:
        """Take in one token per row, `[B, HKV, D]`, in the place of the oldest."""
        at = self.next_slot()
        for name, x in (("keys", k), ("values", v)):
            tensor = self.writable(name)
            tensor[at] = x.to(tensor.dtype)
        self._advance([1] * self.batch_size)

    def oldest(self, count: int) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """The `count` tokens that the next ones will take the place of, in the rows where such a stretch begins.

        That is in the rows that are full and at a multiple of `count`. Returns the index of these rows (`None`: all),
        keys and values `[rows, count, HKV, D]`; nothing where there is no such row.
        """
        due = [n for n, seen in enumerate(self.seen) if seen >= self.slots and seen % count == 0]
        if not due:
            return None
        first = [self.seen[n] % self.slots for n in due]
        if len(due) == self.batch_size and len(set(first)) == 1:
            stretch = slice(first[0], first[0] + count)
            return None, self["keys"][:, :, stretch].transpose(1, 2), self["values"][:, :, stretch].transpose(1, 2)
        rows = self["position"].new_tensor(due)
        slots = self["position"].new_tensor(first)[:, None] + torch.arange(count, device=rows.device)
        return rows, self["keys"][rows[:, None], :, slots], self["values"][rows[:, None], :, slots]

    def next_slot(self) -> tuple:
        """Index into keys and values of the slot that the next token of each row will take: `[B, HKV, D]`."""
        if len(set(self.seen)) == 1:
            return (slice(None), slice(None), self.seen[0] % self.slots)
        position = self["position"]
        return (torch.arange(len(position), device=position.device), slice(None), position % self.slots)

    def _advance(self, lengths: list[int]) -> None:
        same = len(set(lengths)) == 1
        self["position"].add_(lengths[0] if same else self["position"].new_tensor(lengths))
        self.seen = [before + more for before, more in zip(self.seen, lengths, strict=True)]


def token_places(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Row of each token of a call, and its index within that row: both `[tokens]`, on the host."""
    count = torch.tensor(lengths)
    row = torch.arange(len(lengths)).repeat_interleave(count)
    return row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]
