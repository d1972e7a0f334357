"""Tokens of other segments, and sums over all of them, with gradients."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_zoo.kernels.sequence_parallel.group import SequenceGroup


def tokens_before(x: Tensor, count: int, group: SequenceGroup) -> Tensor:
    """The last `count` tokens before this segment, `[B, count, ...]` of x `[B, T, ...]`; zeros before the sequence."""
    return _TokensBefore.apply(x, count, group)


def gather_tokens(x: Tensor, dim: int, group: SequenceGroup) -> Tensor:
    """x of all segments, one after the other along `dim`."""
    return _GatherTokens.apply(x, dim, group)


def total(x: Tensor, group: SequenceGroup) -> Tensor:
    """The sum of x over the segments."""
    return _Total.apply(x, group)


def mean_over_ranks(loss: Tensor, count: Tensor, group: SequenceGroup) -> Tensor:
    """The sum of `loss` over the ranks by that of `count`, the same on all; its gradient is of this rank's part."""
    sums = group.sum(torch.stack([loss.detach(), count.to(loss.dtype)]))
    counted = sums[1].clamp(min=1)
    own = loss / counted
    return own + (sums[0] / counted - own.detach())


class _TokensBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, group):
        ctx.group, ctx.shape = group, x.shape
        ctx.taken = _taken(x.shape[1], count, group.size)
        pieces = [group.shift(x[:, x.shape[1] - size :], hop) for hop, size in enumerate(ctx.taken, start=1)]
        missing = count - sum(ctx.taken)  # further back than there are ranks
        return torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), *pieces[::-1]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, end = dy.new_zeros(ctx.shape), dy.shape[1]
        for hop, size in enumerate(ctx.taken, start=1):
            dx[:, ctx.shape[1] - size :] += ctx.group.shift(dy[:, end - size : end], -hop)
            end -= size
        return dx, None, None


def _taken(length: int, count: int, size: int) -> list[int]:
    """How many tokens of each of the ranks before."""
    hops = min(-(-count // length), size - 1)
    return [min(length, count - hop * length) for hop in range(hops)]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        rows, work = group.gather(x.contiguous())
        work.wait()
        return torch.cat(rows.unbind(), dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.group.sum_scattered(torch.stack(dy.chunk(ctx.group.size, dim=ctx.dim))), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.group.sum(dy), None
