"""Softmax attention within a window, in blocks of its size: the part that linearized attention keeps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.linearized.ring import RingState, token_places

WINDOWS = ("sliding", "terrace")


@dataclass(frozen=True)
class Blocks:
    """The tokens of a call laid out as M blocks of w slots, each text in blocks of its own.

    With a state, a text begins with slots for the keys that its row remembers. In a terrace the blocks lie at multiples
    of w from the beginning of the text, however it is split into calls; for a sliding window they lie anywhere.
    """

    size: int  # w
    texts: int  # B or N
    borders: Tensor | None  # [N + 1], in slots; None: a plain batch, every text has M / B blocks
    exists: Tensor  # [M, w]: whether the slot holds a token
    text: Tensor  # [M]: the text that the block belongs to
    source: Tensor | None = None  # [M * w] into [void, tokens, remembered tokens]
    target: Tensor | None = None  # [tokens]: the slot of each token
    shape: tuple[int, int] = (0, 0)  # B, T of the call

    @classmethod
    def of_batch(cls, shape: tuple[int, int], size: int, device: torch.device) -> Blocks:
        """B texts of T tokens, from their beginning."""
        batch, length = shape
        count = -(-length // size)
        exists = (torch.arange(count * size, device=device) < length).view(count, size).repeat(batch, 1)
        return cls(size, batch, None, exists, torch.arange(batch, device=device).repeat_interleave(count), shape=shape)

    @classmethod
    def of_texts(
        cls,
        shape: tuple[int, int],
        lengths: list[int],
        state: RingState | None,
        size: int,
        kind: str,
        device: torch.device,
    ) -> Blocks:
        """Texts of the given lengths, packed along time or not, each continuing its row of the state.

        The plan is made on the host, from what is known there.
        """
        new, slots = torch.tensor(lengths), 0 if state is None else state.slots
        seen = torch.zeros_like(new) if state is None else torch.tensor(state.seen)
        aligned = kind == "terrace"
        offset = seen % size if aligned else torch.zeros_like(new)  # of the first new token in its block
        borders = F.pad((-(-(offset + new) // size) * size + slots).cumsum(0), (1, 0))
        start = borders[:-1] + slots + offset  # slot of the first new token
        row, index = token_places(lengths)
        target = start[row] + index
        source = torch.zeros(int(borders[-1]), dtype=torch.int64)
        source[target] = torch.arange(1, len(row) + 1)
        if state is not None:
            age = torch.arange(1, slots + 1)
            past = seen[:, None] - age  # remembered tokens of each row, youngest first
            # In a terrace the block before the last one seen, and no older one: those are in the sum.
            oldest = (((seen - 1) // size - 1) * size).clamp_min(0) if aligned else torch.zeros_like(seen)
            held = past >= oldest[:, None]
            place = 1 + len(row) + slots * torch.arange(len(new))[:, None] + past % slots
            source[(start[:, None] - age)[held]] = place[held]
        text = torch.arange(len(new)).repeat_interleave(borders.diff() // size)
        source, target, borders, text = (x.to(device) for x in (source, target, borders, text))
        return cls(size, len(new), borders, (source > 0).view(-1, size), text, source, target, shape)

    @property
    def new(self) -> Tensor:
        """Which slots hold tokens of this call, `[M, w]`."""
        return self.exists & (self.source <= len(self.target)).view_as(self.exists)

    def lay(self, x: Tensor, remembered: Tensor | None = None) -> Tensor:
        """`[B, T, H, D]`, and `[N, H, slots, D]` from a state, to `[M, w, H, D]`; zeros where nothing exists."""
        if self.source is None:
            return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.size)).reshape(-1, self.size, *x.shape[2:])
        parts = [x.new_zeros(1, *x.shape[2:]), x.flatten(0, 1)]
        source = self.source
        if remembered is not None:
            parts.append(remembered.transpose(1, 2).flatten(0, 1).to(x.dtype))
        else:
            source = source * (source <= len(self.target))
        return torch.cat(parts)[source].unflatten(0, (-1, self.size))

    def read(self, x: Tensor) -> Tensor:
        """`[M, w, ...]` to `[B, T, ...]`."""
        if self.target is None:
            return x.reshape(self.texts, -1, *x.shape[2:])[:, : self.shape[1]]
        return x.flatten(0, 1)[self.target].unflatten(0, self.shape)

    def along_time(self, x: Tensor) -> Tensor:
        """`[M, w, ...]` to `[B, slots of a text, ...]`, or all texts packed to `[1, M * w, ...]`."""
        return x.reshape(self.texts if self.borders is None else 1, -1, *x.shape[2:])

    def before(self, x: Tensor, count: int = 1) -> Tensor:
        """In the place of each block the one `count` before it; zeros where the text begins later."""
        return self._earlier(x, count) * self.has_before(count).view(-1, *[1] * (x.dim() - 1))

    def has_before(self, count: int = 1) -> Tensor:
        """Whether the text has a block `count` before, `[M]`."""
        return self.text == F.pad(self.text, (count, 0), value=-1)[: len(self.text)]

    @staticmethod
    def _earlier(x: Tensor, count: int) -> Tensor:
        return torch.cat([torch.zeros_like(x[:count]), x[:-count]])[: len(x)]


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q . k: `[M, w, H, D]` and `[M, s, HK, D]` to `[M, HK, G, w, s]`, where G = H / HK queries share a key."""
    length, groups = q.shape[1], (k.shape[2], -1)
    q = q.unflatten(2, groups).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return (q @ k.permute(0, 2, 3, 1)).unflatten(2, (-1, length))


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """`[M, HK, G, w, s]` and `[M, s, HK, V]` to `[M, w, H, V]`."""
    o = weights.flatten(2, 3) @ v.transpose(1, 2)
    return o.unflatten(2, weights.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def window_sums(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scale: float, kind: str) -> Tensor:
    r"""The softmax of each token's window before its division.

        y_n = sum_{i in window of n} e^{s_ni - c_n} v_i        s_ni = scale q_n . k_i        c_n = max_i s_ni

    The window is the last w tokens ("sliding"), or the token's own block of w and the one before ("terrace"); itself
    included, and nothing later.

    Args:
        q: `[M, w, H, D]`. k, v: `[M, w, HKV, D]`. As `blocks` lays them out.

    Returns:
        `[M, w, H, V]`. Where v is [v, 1] the last column is the denominator, at least 1.
    """
    row = torch.arange(blocks.size, device=q.device)[:, None]
    slot = torch.arange(-blocks.size, blocks.size, device=q.device)  # counted from the block's first
    seen = slot <= row
    if kind == "sliding":
        seen = seen & (slot > row - blocks.size)
    exists = torch.cat([blocks.before(blocks.exists), blocks.exists], dim=1)
    # A slot without a token sees itself, so that its maximum is finite and no NaN meets the gradient.
    seen = (seen & exists[:, None]) | (slot == row)
    s = scores(q * scale, torch.cat([blocks.before(k), k], dim=1)).masked_fill(~seen[:, None, None], float("-inf"))
    return weighted_sum((s - s.amax(dim=-1, keepdim=True)).exp(), torch.cat([blocks.before(v), v], dim=1))


def ring_sums(q: Tensor, state: RingState, *, scale: float, size: int, kind: str) -> Tensor:
    """`window_sums` for the token that `state` took in last: `[B, H, D]` to `[B, H, V + 1]`, the denominator beside."""
    keys, values = (state[name].to(q.dtype).flatten(0, 1) for name in ("keys", "values"))
    s = torch.bmm((q * scale).reshape(len(keys), -1, q.shape[-1]), keys.mT)  # [B * HKV, G, slots]
    _hide_others(s, state, size, kind)
    weights = (s - s.amax(dim=-1, keepdim=True)).exp_()
    return torch.cat([torch.bmm(weights, values), weights.sum(dim=-1, keepdim=True)], dim=-1).view(*q.shape[:2], -1)


def _hide_others(s: Tensor, state: RingState, size: int, kind: str) -> None:
    """-inf, in place, in the slots that are empty or, in a terrace, hold a token from before the last two blocks."""
    token = state.seen[0] - 1
    if kind == "sliding" and min(state.seen) >= size:
        return
    if len(set(state.seen)) == 1:
        first = 0 if kind == "sliding" else token // size % 2 * size
        s[..., first + token % size + 1 : first + size] = -torch.inf
        if kind == "terrace" and token < size:
            s[..., size:] = -torch.inf
        return
    position = state["position"][:, None] - 1
    reach = position if kind == "sliding" else torch.minimum(position, position % size + size)
    age = (position - torch.arange(state.slots, device=s.device)) % state.slots
    s.view(len(position), -1, state.slots).masked_fill_((age > reach)[:, None], -torch.inf)


def text_lengths(shape: tuple[int, int], cu_seqlens: Tensor | None) -> list[int]:
    """Tokens of each text of the call."""
    batch, length = shape
    if cu_seqlens is None:
        return [length] * batch
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, length)
    return [end - start for start, end in itertools.pairwise(bounds)]
