"""Linear-attention and state-space language models on one set of chunkwise-parallel kernels.

from lm_zoo import GatedLinearAttention          # a layer for your own model
from lm_zoo import ZooConfig, ZooForCausalLM     # a whole model; AutoModelForCausalLM loads its folders
"""

from transformers import AutoConfig, AutoModelForCausalLM

from lm_zoo.cache import ZooCache
from lm_zoo.config import ZooConfig
from lm_zoo.layers import (
    HGRN,
    HGRN2,
    MIXERS,
    S4D,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LayerState,
    LightNet,
    LightningAttention,
    LinearAttention,
    Mamba,
    Mamba2,
    Mixer,
    MultiScaleRetention,
    SoftmaxAttention,
)
from lm_zoo.model import ZooForCausalLM, ZooModel

__all__ = [
    "HGRN",
    "HGRN2",
    "MIXERS",
    "S4D",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LayerState",
    "LightNet",
    "LightningAttention",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MultiScaleRetention",
    "SoftmaxAttention",
    "ZooCache",
    "ZooConfig",
    "ZooForCausalLM",
    "ZooModel",
]

AutoConfig.register(ZooConfig.model_type, ZooConfig, exist_ok=True)
AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM, exist_ok=True)
