"""Pretrained transformers with another attention inside."""

from lm_zoo.linearized.inner import INNER_MIXERS, Context, InnerMixer
from lm_zoo.linearized.interface import softmax

__all__ = ["INNER_MIXERS", "Context", "InnerMixer", "softmax"]
