"""The passes of the chunkwise form in Triton: the twins of those in `torch_passes.py`, where they are explained.

Same names, same signatures, same results; only the layout differs. Tensors stay as the caller has them, `[B, T, H, D]`,
and kernels read the tokens of a chunk in place (`segment.py`); scores are `[B, T, HV, C]`, states `[M, HV, K, V]`. q, k
and v keep their dtype, products of tiles accumulate in float32, and gates, sums and states are float32.
"""

from lm_zoo.kernels.linear_attention.triton_passes.decay import cumulative_decay, cumulative_decay_backward
from lm_zoo.kernels.linear_attention.triton_passes.delta import delta_apply, delta_transform
from lm_zoo.kernels.linear_attention.triton_passes.delta_backward import delta_transform_backward
from lm_zoo.kernels.linear_attention.triton_passes.gradients import chunk_gradients
from lm_zoo.kernels.linear_attention.triton_passes.output import chunk_output
from lm_zoo.kernels.linear_attention.triton_passes.output_backward import chunk_output_backward
from lm_zoo.kernels.linear_attention.triton_passes.scores import chunk_scores, saved_dtypes
from lm_zoo.kernels.linear_attention.triton_passes.scores_backward import chunk_scores_backward
from lm_zoo.kernels.linear_attention.triton_passes.segment import cut
from lm_zoo.kernels.linear_attention.triton_passes.states import chunk_states
from lm_zoo.kernels.linear_attention.triton_passes.states_backward import chunk_states_backward

__all__ = [
    "chunk_gradients",
    "chunk_output",
    "chunk_output_backward",
    "chunk_scores",
    "chunk_scores_backward",
    "chunk_states",
    "chunk_states_backward",
    "cumulative_decay",
    "cumulative_decay_backward",
    "cut",
    "delta_apply",
    "delta_transform",
    "delta_transform_backward",
    "saved_dtypes",
]
