"""Sequence parallelism: one sequence over many ranks, each with a segment of it, for every op and every mixer.

    with sequence_parallel(mesh["sequence"], form="ring") as ranks:
        y = layer(ranks.segment(x))

Ops ask `active_group()` whether their tokens are a segment. What depends on time outside of the ops (positions, labels,
attention) asks, too, and finds here what it needs of the other ranks.

`group.py` is the block and the messages, `carry.py` the scan over ranks, `exchange.py` tokens and sums of other ranks,
`segment.py` where a segment lies among packed documents, `recurrences.py` and `convolution.py` the ops, `volume.py` the
bytes that each form sends.
"""

from lm_zoo.kernels.sequence_parallel.carry import Carry, LogSum, Matrix, Product, scan_ranks
from lm_zoo.kernels.sequence_parallel.exchange import gather_tokens, mean_over_ranks, tokens_before, total
from lm_zoo.kernels.sequence_parallel.group import (
    SequenceGroup,
    active_group,
    alone,
    refuse_steps,
    sequence_parallel,
)
from lm_zoo.kernels.sequence_parallel.segment import Segment

__all__ = [
    "Carry",
    "LogSum",
    "Matrix",
    "Product",
    "Segment",
    "SequenceGroup",
    "active_group",
    "alone",
    "gather_tokens",
    "mean_over_ranks",
    "refuse_steps",
    "scan_ranks",
    "sequence_parallel",
    "tokens_before",
    "total",
]
