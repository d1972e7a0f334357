"""Linear-attention and state-space language models on one set of chunkwise-parallel kernels.

from lm_zoo import GatedLinearAttention          # a layer for your own model
from lm_zoo import ZooConfig, ZooForCausalLM     # a whole model; AutoModelForCausalLM loads its folders
from lm_zoo.kernels import linear_attention      # the ops alone; these need PyTorch and nothing else
"""

import importlib.util

__all__ = [
    "HGRN",
    "HGRN2",
    "MIXERS",
    "S4D",
    "DecodeStep",
    "DeltaNet",
    "DeltaProduct",
    "Engine",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LayerState",
    "LightNet",
    "LightningAttention",
    "LinearAttention",
    "LinearizedConfig",
    "LinearizedForCausalLM",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MultiScaleRetention",
    "PrefixStore",
    "SoftmaxAttention",
    "ZooCache",
    "ZooConfig",
    "ZooForCausalLM",
    "ZooModel",
    "pack_weights",
]

if importlib.util.find_spec("transformers") is not None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from lm_zoo.cache import ZooCache
    from lm_zoo.config import ZooConfig
    from lm_zoo.decode import DecodeStep
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
    from lm_zoo.linearized import LinearizedConfig, LinearizedForCausalLM
    from lm_zoo.model import ZooForCausalLM, ZooModel
    from lm_zoo.packing import pack_weights
    from lm_zoo.prefix_store import PrefixStore
    from lm_zoo.serving import Engine

    AutoConfig.register(ZooConfig.model_type, ZooConfig, exist_ok=True)
    AutoConfig.register(LinearizedConfig.model_type, LinearizedConfig, exist_ok=True)
    AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(LinearizedConfig, LinearizedForCausalLM, exist_ok=True)
else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"lm_zoo.{name} needs transformers: pip install transformers")
        raise AttributeError(f"module 'lm_zoo' has no attribute {name!r}")
