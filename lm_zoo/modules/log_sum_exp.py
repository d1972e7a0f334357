"""The running log-sum-exp over time, which normalises keys without a denominator."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.kernels.linear_scan import linear_scan
from lm_zoo.kernels.sequence_parallel import Carry, LogSum, Segment, SequenceGroup, active_group, alone


def running_log_sum_exp(
    x: Tensor, start: Tensor, cu_seqlens: Tensor | None = None, *, output_final_state: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""z_t = log(exp(z_{t-1}) + exp(x_t)), in the dtype of `start`.

    Args:
        x: `[B, T, D]`.
        start: z before the first token, `[B, D]`, or `[N, D]` with `cu_seqlens`; -inf where nothing was before.
        cu_seqlens: `[N + 1]`, borders of N documents packed along time; needs B = 1.

    Returns:
        z_{t-1} and z_t, `[B, T, D]`, and the last z, shaped as `start`, or `None` where it is not asked for.
    """
    x = x.to(start.dtype)
    if (group := active_group()) is not None:
        return _of_segment(x, start, cu_seqlens, group, output_final_state)
    steps = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        first, past, ends = (steps == 0)[:, None], start[:, None], None
    else:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would stall the device
            check_bounds(cu_seqlens.tolist(), x.shape[1])
        document = torch.searchsorted(cu_seqlens, steps, right=True) - 1  # `right`: empty documents own no token
        first, past = (steps == cu_seqlens[document])[:, None], start[document][None]
        ends = cu_seqlens[1:] - 1
    z = _Running.apply(torch.where(first, torch.logaddexp(x, past), x), first, cu_seqlens is not None)
    before = torch.where(first, past, F.pad(z, (0, 0, 1, -1)))
    if ends is None:
        return before, z, z[:, -1]
    return before, z, torch.where((cu_seqlens.diff() == 0)[:, None], start, z[0, ends.clamp(min=0)])


@torch.compiler.disable
def _of_segment(x, start, cu_seqlens, group: SequenceGroup, output_final_state: bool):
    """The same for a segment of x, in two runs: for the sum that it adds, and from the sum of all segments before."""
    segment = Segment(group, x.shape[1], cu_seqlens, x.device)
    own = segment.own(start, -torch.inf)
    with alone():
        added = segment.leaving(running_log_sum_exp(x, own, segment.cu_seqlens)[2])
        log_M = added.new_zeros(1, 1)
        if segment.packed:
            log_M = log_M.masked_fill(~segment.whole(), -torch.inf)
        z_in = Carry(group, log_M, added, segment.start_of(start), LogSum).arrive()
        before, z, last = running_log_sum_exp(x, segment.entering(z_in, own), segment.cu_seqlens)
    return before, z, segment.final(last) if output_final_state else None


class _Running(torch.autograd.Function):
    """The log-sum-exp of all x since the last `first` `[T, 1]`; with dz, dx_s = sum_{t >= s} dz_t exp(x_s - z_t)."""

    @staticmethod
    def forward(ctx, x, first, packed):
        z = _by_doubling(x, first) if packed else x.logcumsumexp(dim=1)
        ctx.save_for_backward(x, z, first)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, z, first = ctx.saved_tensors
        # r_t = dz_t + exp(z_t - z_{t+1}) r_{t+1}, all factors at most 1, and 0 across the end of a document
        decay = (z[:, :-1] - z[:, 1:]).clamp(max=0).exp().masked_fill(first[1:], 0)
        with alone():  # of a segment, too: z_in has its own gradient
            r = linear_scan(dz, F.pad(decay, (0, 0, 0, 1)), reverse=True)[0]
        return r * (x - z).exp(), None, None


def _by_doubling(x: Tensor, first: Tensor) -> Tensor:
    """After step n every token holds the sum over its last 2^n tokens, cut where its document began."""
    steps = torch.arange(x.shape[1], device=x.device)[:, None]
    age = steps - (steps * first).cummax(dim=0).values  # tokens since the document began
    z, reach = x, 1
    while reach < x.shape[1]:
        earlier = F.pad(z, (0, 0, reach, -reach)).masked_fill(age < reach, -torch.inf)
        z = torch.logaddexp(z, earlier)
        reach *= 2
    return z
