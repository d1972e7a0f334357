"""Pretrained transformers with another attention inside: the same weights, but for the softmax.

student = LinearizedForCausalLM.from_teacher(teacher, "hybrid", {"window": 64}, keep_layers=[0])
"""

from lm_zoo.linearized.config import LinearizedConfig
from lm_zoo.linearized.families import FAMILIES, check_teacher, family_of
from lm_zoo.linearized.hybrid import HybridAttention
from lm_zoo.linearized.inner import INNER_MIXERS, Context, InnerMixer
from lm_zoo.linearized.interface import softmax
from lm_zoo.linearized.liger import LigerAttention
from lm_zoo.linearized.model import LinearizedForCausalLM
from lm_zoo.linearized.registered import RegisteredMixer

__all__ = [
    "FAMILIES",
    "INNER_MIXERS",
    "Context",
    "HybridAttention",
    "InnerMixer",
    "LigerAttention",
    "LinearizedConfig",
    "LinearizedForCausalLM",
    "RegisteredMixer",
    "check_teacher",
    "family_of",
    "softmax",
]
