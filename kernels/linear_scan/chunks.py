"""Where the chunks of a call lie, for kernels that read tokens in place: found on the device, without waiting for it.

Every sequence is cut from its own start, so what is computed for it does not depend on what else is in the batch. A
batch of equal sequences needs arithmetic only; packed ones need two tables.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks(NamedTuple):
    count: int  # of packed sequences an upper bound: those past the last chunk have no tokens
    sequences: int
    per_sequence: int  # at most
    cu_seqlens: Tensor | None = None
    sequence_of: Tensor | None = None  # [count], the sequence of a chunk
    first_chunk: Tensor | None = None  # [N + 1], of a sequence


def cut(batch: int, length: int, cu_seqlens: Tensor | None, chunk_length: int) -> Chunks:
    per_sequence = -(-length // chunk_length)
    if cu_seqlens is None:
        return Chunks(batch * per_sequence, batch, per_sequence)
    sequences = cu_seqlens.shape[0] - 1
    count = length // chunk_length + sequences
    ends = ((cu_seqlens.diff() + chunk_length - 1) // chunk_length).cumsum(0)
    numbers = torch.arange(count, device=cu_seqlens.device)
    sequence_of = torch.searchsorted(ends, numbers, right=True).clamp_(max=sequences - 1)
    return Chunks(count, sequences, per_sequence, cu_seqlens.contiguous(), sequence_of, F.pad(ends, (1, 0)))
