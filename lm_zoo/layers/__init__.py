"""The mixers. A new one is one file here and one line in `MIXERS`."""

from lm_zoo.layers.attention import SoftmaxAttention
from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.deltanet import DeltaNet
from lm_zoo.layers.deltaproduct import DeltaProduct
from lm_zoo.layers.gated_deltanet import GatedDeltaNet
from lm_zoo.layers.gla import GatedLinearAttention
from lm_zoo.layers.hgrn import HGRN
from lm_zoo.layers.hgrn2 import HGRN2
from lm_zoo.layers.kda import KimiDeltaAttention
from lm_zoo.layers.lightnet import LightNet
from lm_zoo.layers.lightning import LightningAttention
from lm_zoo.layers.linear_attention import LinearAttention
from lm_zoo.layers.mamba import Mamba
from lm_zoo.layers.mamba2 import Mamba2
from lm_zoo.layers.prefix import PrefixMixer
from lm_zoo.layers.retention import MultiScaleRetention
from lm_zoo.layers.s4d import S4D

MIXERS: dict[str, type[Mixer]] = {
    "retnet": MultiScaleRetention,
    "gla": GatedLinearAttention,
    "linear_attention": LinearAttention,
    "lightning": LightningAttention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "lightnet": LightNet,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "deltaproduct": DeltaProduct,
    "kda": KimiDeltaAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4d": S4D,
    "attention": SoftmaxAttention,
}

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
    "PrefixMixer",
    "SoftmaxAttention",
]
