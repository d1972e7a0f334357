"""The ops that every model of the zoo shares. They know nothing of models."""

from lm_zoo.kernels.causal_conv import causal_conv1d
from lm_zoo.kernels.linear_attention import linear_attention, linear_attention_step
from lm_zoo.kernels.linear_scan import linear_scan, linear_scan_step
from lm_zoo.kernels.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "selective_scan",
    "selective_scan_step",
]
