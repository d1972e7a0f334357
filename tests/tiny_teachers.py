"""Tiny random transformers of every family that can be linearized, with what is peculiar about each."""

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
LAYERS = 3
WINDOW = 5  # of sliding-window attention, where a family has it
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZES |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 40}
LOCAL = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

TEACHERS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", GROUPED | {"attention_bias": True, "head_dim": 6}),
    "mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "mistral-global": ("mistral", GROUPED | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED | LOCAL | {"use_sliding_window": True}),
    "qwen3": ("qwen3", GROUPED | LOCAL | {"use_sliding_window": True, "head_dim": 12, "attention_bias": True}),
    "gemma": ("gemma", GROUPED | {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma3": ("gemma3_text", GROUPED | LOCAL | {"head_dim": 12, "query_pre_attn_scalar": 20}),
    "gemma3-cap": ("gemma3_text", GROUPED | LOCAL | {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "smollm3": ("smollm3", GROUPED | LOCAL | {"use_sliding_window": True, "no_rope_layers": [1, 1, 0]}),
    "phi": ("phi", GROUPED | {"qk_layernorm": True, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "phi3": ("phi3", GROUPED | {"sliding_window": WINDOW, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "olmo2": ("olmo2", GROUPED),
    "granite": (
        "granite",
        GROUPED | {"attention_multiplier": 0.3, "logits_scaling": 3.0, "residual_multiplier": 0.7}
        | {"embedding_multiplier": 2.0},
    ),
    "gpt_neox": (
        "gpt_neox",
        SIZES | {"intermediate_size": 40, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "gpt2": ("gpt2", SIZES | {"scale_attn_by_inverse_layer_idx": True}),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": WINDOW, "use_bias": True}),
}  # fmt: skip


def teacher_config(name: str, **changes):
    kind, options = TEACHERS[name]
    return AutoConfig.for_model(kind, **copy.deepcopy(options | changes))


def new_teacher(name: str, **changes) -> PreTrainedModel:
    """A teacher of one's own, without dropout, all parameters random (also biases and norms)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(teacher_config(name, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    model.generation_config.suppress_tokens = [0]  # or generate() would take a 0 that it wrote for padding
    return model


@functools.cache
def teacher(name: str) -> PreTrainedModel:
    """The same, shared by all tests: not to be changed."""
    return new_teacher(name).requires_grad_(False)
