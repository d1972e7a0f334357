"""Pass 2 backwards: chunk_scores_backward."""

from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.channel_scores import channel_scores_backward
from lm_zoo.kernels.linear_attention.triton_passes.segment import Segment


def chunk_scores_backward(
    dA_qk: Tensor | None,
    dA_kk: Tensor | None,
    q: Tensor,
    k: Tensor,
    G: Tensor | None,
    A_qk: Tensor | None,
    A_kk: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dG: Tensor | None,
    segment: Segment,
) -> None:
    """Adds to dq, dk and dG, if there is one, with a decay per channel; without one, `chunk_gradients` and
    `delta_transform_backward` form the scores themselves and have done so already."""
    if dA_qk is not None:
        channel_scores_backward(dA_qk, dA_kk, q, k, G, scale, dq, dk, dG, segment)
