"""The families of transformers that can be teachers, and what is particular about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lm_zoo.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where a family keeps what we need.

    Attributes:
        blocks: name of the list of blocks in the base model.
        attention: name of the attention in a block.
        window: whether the configuration's `sliding_window` holds in no layer, in all, or where `layer_types` says so.
        logit_divisor: name of the option that the logits are divided by.
        logit_cap: name of the option c in c tanh(logits / c).
        positions: name of the option that says how many positions have a learned embedding.
        refused: options that no inner mixer can stand in for, and why.
    """

    blocks: str = "layers"
    attention: str = "self_attn"
    window: Literal["never", "always", "by layer"] = "never"
    logit_divisor: str | None = None
    logit_cap: str | None = None
    positions: str | None = None
    refused: tuple[tuple[str, str], ...] = ()

    def attention_layers(self, teacher: PreTrainedModel) -> list[nn.Module]:
        """The attention modules of a causal language model, in the order of the layers."""
        return [getattr(block, self.attention) for block in getattr(teacher.base_model, self.blocks)]

    def softmax_window(self, config: PreTrainedConfig, layer: int) -> int | None:
        """How many tokens a query sees in that layer of the teacher, itself included; `None` if all."""
        if self.window == "never" or (self.window == "by layer" and config.layer_types[layer] != "sliding_attention"):
            return None
        return config.sliding_window


BOTH_WAYS = (("use_bidirectional_attention", "its attention looks ahead"),)
FAMILIES: dict[str, Family] = {
    "gemma": Family(refused=BOTH_WAYS),
    "gemma3_text": Family(window="by layer", logit_cap="final_logit_softcapping", refused=BOTH_WAYS),
    "gpt2": Family(
        blocks="h",
        attention="attn",
        positions="n_positions",
        refused=(("add_cross_attention", "it has cross attention"),),
    ),
    "gpt_neox": Family(attention="attention"),
    "granite": Family(logit_divisor="logits_scaling"),
    "llama": Family(),
    "mistral": Family(window="always"),
    "olmo2": Family(),
    "phi": Family(),
    "phi3": Family(window="always"),
    "qwen2": Family(window="by layer"),
    "qwen3": Family(window="by layer"),
    "smollm3": Family(window="by layer"),
    "starcoder2": Family(window="always"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's configuration; UserError where it cannot be one."""
    kind = config.model_type
    if kind not in FAMILIES:
        advice = ""
        if (text := getattr(config.get_text_config(), "model_type", kind)) in FAMILIES:
            advice = f"; give its text model ({text}) alone"
        raise UserError(
            f"the teacher's family {kind!r} cannot be linearized{advice}; supported: {', '.join(sorted(FAMILIES))}"
        )
    for option, reason in FAMILIES[kind].refused:
        if getattr(config, option, None):
            raise UserError(
                f"this {kind} teacher cannot be linearized: {reason} ({option} is set in its configuration)"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"this {kind} teacher is quantized: load it without quantization_config, in 16 bits")
    return FAMILIES[kind]


def check_teacher(teacher: PreTrainedModel) -> Family:
    """The family of a teacher; UserError where the model cannot be one."""
    if not isinstance(teacher, PreTrainedModel):
        raise UserError(f"the teacher must be a causal language model of transformers, got {type(teacher).__name__}")
    family = family_of(teacher.config)
    if teacher.config._attn_implementation == "lm_zoo":
        raise UserError("the teacher is the inside of a LinearizedForCausalLM: give the as_teacher() of that one")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(teacher.config)]
    if not isinstance(teacher, expected):
        raise UserError(
            f"the teacher must be a {expected.__name__}, got a {type(teacher).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    return family


def geometry(attention: nn.Module) -> dict[str, int | float]:
    """Sizes and scale of a teacher's attention module, as an `InnerMixer` takes them."""
    heads = attention.config.num_attention_heads
    return {
        "num_heads": heads,
        "num_kv_heads": heads // getattr(attention, "num_key_value_groups", 1),
        "head_size": attention.head_size if hasattr(attention, "head_size") else attention.head_dim,
        "scale": attention.scaling,
        "hidden_size": attention.config.hidden_size,
    }
