"""The short convolution over a segment: the last inputs of the segment before take the place of its state."""

from collections.abc import Callable

import torch
from torch import Tensor

from lm_zoo.kernels.sequence_parallel.exchange import tokens_before
from lm_zoo.kernels.sequence_parallel.group import SequenceGroup, alone
from lm_zoo.kernels.sequence_parallel.segment import Segment


@torch.compiler.disable
def causal_conv1d_segment(
    op: Callable[..., Tensor],
    group: SequenceGroup,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    """The arguments of `causal_conv1d`, checked."""
    segment, reach = Segment(group, x.shape[1], cu_seqlens, x.device), weight.shape[1] - 1
    before = tokens_before(x, reach, group)
    older = x.new_zeros(segment.rows(x.shape[0]), x.shape[2], reach) if state is None else state.to(x.dtype)
    # Slots before the document's start are its state's: token -1 of the document is in the last one.
    distance = segment.distance(reach).to(x.device)
    past = older.index_select(2, (reach + distance).clamp(0, max(reach - 1, 0)))
    past = torch.where(distance >= 0, before.mT, past)
    local = segment.entering(past, segment.own(older)).clone()
    with alone():
        y = op(x, weight, bias, activation=activation, state=local, cu_seqlens=segment.cu_seqlens, backend=backend)
    if state is not None:
        state.copy_(segment.final(local))
    return y
