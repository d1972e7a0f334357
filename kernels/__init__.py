"""The ops that every model of the zoo shares. They know nothing of models."""

from lm_zoo.kernels.linear_attention import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
