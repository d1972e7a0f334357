"""Padded batches as packed documents: the tokens of all rows end to end, so that padding touches nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.sequence_parallel import SequenceGroup, active_group, gather_tokens


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch are, and the borders of the rows once they are packed."""

    index: Tensor  # [tokens], into the flattened [B * T]
    cu_seqlens: Tensor  # [B + 1]
    shape: tuple[int, int]  # B, T

    @classmethod
    def find(cls, attention_mask: Tensor, batch: int, length: int, past: int = 0) -> Padding | None:
        """The padding that a mask of 0 and 1 describes, `None` where it has none.

        The mask is `[B, T]`, or `[B, past + T]` with the columns of a cache before; only the last T matter.
        """
        mask = cls.columns(attention_mask, batch, length, past).bool()
        group = active_group()
        if group is not None:
            group.check_length(length, mask.device)
            mask, length = gather_tokens(mask, 1, group), group.size * length
        if mask.all():
            return None
        index = mask.flatten().nonzero().squeeze(1)
        if group is not None:
            return SharedPadding.of(index, mask, group)
        return cls(index, F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)), (batch, length))

    @staticmethod
    def columns(attention_mask: Tensor, batch: int, length: int, past: int = 0) -> Tensor:
        """The last T columns of such a mask."""
        if (
            attention_mask.dim() != 2
            or attention_mask.shape[0] != batch
            or (attention_mask.shape[1] not in (length, past + length))
        ):
            raise ValueError(
                f"attention_mask must be [B, T] = [{batch}, {length}]"
                + (f" or [B, past + T] = [{batch}, {past + length}]" if past else "")
                + f", got {list(attention_mask.shape)}"
            )
        return attention_mask[:, -length:]

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[1, tokens, ...]`."""
        return x.flatten(0, 1)[self.index][None]

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """`[1, tokens, ...]` to `[B, T, ...]`, with `fill` at the padding."""
        batch, length = self.shape
        full = x.new_full((batch * length, *x.shape[2:]), fill)
        return full.index_copy(0, self.index, x[0]).unflatten(0, self.shape)


@dataclass(frozen=True)
class SharedPadding(Padding):
    """The padding of a batch whose rows lie in segments on many ranks, and that is packed into segments again.

    The tokens are gathered for it, here and at the end; the layers see packed documents, and every rank has as much to
    do. So many tokens as are missing to equal segments are one more document.
    """

    group: SequenceGroup
    missing: int

    @classmethod
    def of(cls, index: Tensor, mask: Tensor, group: SequenceGroup) -> SharedPadding:
        """`mask` `[B, n T]`: which tokens of all segments there are, at `index` when it is flattened."""
        cu_seqlens, missing = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)), -len(index) % group.size
        if missing:
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])
        return cls(index, cu_seqlens, tuple(mask.shape), group, missing)

    def pack(self, x: Tensor) -> Tensor:
        packed = super().pack(gather_tokens(x, 1, self.group))
        return self.group.segment(F.pad(packed, (0, 0) * (x.dim() - 2) + (0, self.missing)))

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        packed = gather_tokens(x, 1, self.group)
        return self.group.segment(super().unpack(packed[:, : len(self.index)], fill))
