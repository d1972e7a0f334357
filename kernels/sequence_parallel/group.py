"""The ranks that share a sequence, what they send each other, and the `with` block that says so.

Bytes go through the wire as they are, so every dtype does, complex ones too. `received` counts those that reach this
rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lm_zoo.kernels.checks import check_option

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FORMS = ("all_gather", "ring")
# The names since torch 2.13, which warns of the older ones. (Not every build of torch has either.)
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

_active: SequenceGroup | None = None


@contextmanager
def sequence_parallel(group: DeviceMesh | dist.ProcessGroup, form: str = "all_gather") -> Iterator[SequenceGroup]:
    """Inside the `with` block, every op works on this rank's segment of a sequence that all ranks of `group` share.

        with sequence_parallel(mesh["sequence"]) as ranks:
            loss = model(ranks.segment(input_ids), labels=ranks.segment(input_ids)).loss
            loss.backward()

    Rank r of n holds tokens r T to (r + 1) T of n T. What is not along time (`cu_seqlens`, initial states, parameters)
    is that of the whole sequence and the same on every rank; final states and the mean loss come out the same on every
    rank. The gradient of what all ranks hold is the sum of what they compute. All ranks must make the same calls, in
    the backward pass too; where blocks are checkpointed, that belongs inside the `with` block.

    Args:
        group: one dimension of a device mesh, or a process group.
        form: "all_gather" (LASP-2, Sun et al. 2025, arXiv 2502.07563): every rank gets the contributions of all
            segments at once, while it computes its own; "ring" (ZeCO, Chou et al. 2025, arXiv 2507.01004): the state
            goes from rank to rank in blocks, and what a rank sends does not grow with their number.
    """
    global _active
    before, _active = _active, SequenceGroup(group, form)
    try:
        yield _active
    finally:
        _active = before


@contextmanager
def alone() -> Iterator[None]:
    """Inside the `with` block, ops take what they get for a whole sequence."""
    global _active
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


def active_group() -> SequenceGroup | None:
    """The ranks of the `with` block that this is called in."""
    return _active


def refuse_steps(name: str) -> None:
    """Decoding is one token at a time: there is nothing to share."""
    if _active is not None:
        raise ValueError(
            f"{name} takes one token, which ranks cannot share: leave the sequence_parallel block to decode, or give "
            "every rank at least two tokens"
        )


class SequenceGroup:
    """The ranks of a sequence, in the order of their segments.

    Attributes:
        rank, size: this rank, and how many there are.
        form: "all_gather" or "ring".
        received: bytes that reached this rank so far, but for those of checks.
    """

    def __init__(self, group: DeviceMesh | dist.ProcessGroup, form: str):
        from torch.distributed.device_mesh import DeviceMesh  # not when lm_zoo is imported: it takes a while

        check_option("form", form, FORMS)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f'group must be one dimension of the mesh, such as mesh["sequence"], got all {group.ndim}: '
                    f"{group.mesh_dim_names}"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a DeviceMesh or a ProcessGroup, got {type(group).__name__}")
        self.group, self.form = group, form
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.received = 0

    def segment(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x, which is the same on every rank."""
        length = x.shape[dim]
        if length % self.size:
            raise ValueError(
                f"T = {length} tokens do not divide by the {self.size} ranks of sequence_parallel: pad them to "
                f"{-(-length // self.size) * self.size}"
            )
        return x.chunk(self.size, dim)[self.rank]

    def check_length(self, length: int, device: torch.device) -> None:
        """Whether all ranks have segments of one length: on a CPU, where looking does not stall the device."""
        if device.type != "cpu":
            return
        lengths = torch.empty(self.size, dtype=torch.int64)
        getattr(dist, ALL_GATHER)(lengths, torch.tensor([length]), group=self.group)
        if (lengths != length).any():
            raise ValueError(
                f"T must be the same on all ranks of sequence_parallel, got {lengths.tolist()}: pad the sequence to a "
                f"multiple of the {self.size} ranks"
            )

    def gather(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """x of every rank, `[n, ...]`, once the work is done."""
        message = _bytes(x)
        rows = message.new_empty(self.size * message.numel())
        work = getattr(dist, ALL_GATHER)(rows, message, group=self.group, async_op=True)
        self.received += (self.size - 1) * message.numel()
        return rows.view(x.dtype).view(self.size, *x.shape), work

    def send(self, x: Tensor, rank: int) -> dist.Work:
        return dist.isend(_bytes(x), group=self.group, group_dst=rank)

    def receive(self, like: Tensor, rank: int) -> tuple[Tensor, dist.Work]:
        """What `rank` sends, in the shape and dtype of `like`, once the work is done."""
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.received += buffer.nbytes
        return buffer, dist.irecv(_bytes(buffer), group=self.group, group_src=rank)

    def shift(self, x: Tensor, hops: int) -> Tensor:
        """The x of the rank `hops` before this one (after it, where negative); zeros where there is none."""
        out, transfers = torch.zeros_like(x, memory_format=torch.contiguous_format), []
        to, origin = self.rank + hops, self.rank - hops
        if 0 <= to < self.size:
            transfers.append(dist.P2POp(dist.isend, _bytes(x), group=self.group, group_peer=to))
        if 0 <= origin < self.size:
            transfers.append(dist.P2POp(dist.irecv, _bytes(out), group=self.group, group_peer=origin))
            self.received += out.nbytes
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(torch.view_as_real(out) if out.is_complex() else out, group=self.group)
        self.received += 2 * out.nbytes * (self.size - 1) // self.size
        return out

    def sum_scattered(self, rows: Tensor) -> Tensor:
        """The sum over the ranks of what they have in row `rank` of `[n, ...]`."""
        out = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
        getattr(dist, REDUCE_SCATTER)(
            out.view(-1), rows.contiguous().view(-1), group=self.group
        )  # flat, as gloo wants them
        self.received += out.nbytes * (self.size - 1)
        return out


def _bytes(x: Tensor) -> Tensor:
    return x.resolve_conj().contiguous().view(-1).view(torch.uint8)
