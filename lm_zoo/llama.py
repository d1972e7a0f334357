"""The zoo's softmax transformer under the names of a Llama, which everybody's tools know."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.layers.attention import SoftmaxAttention
from lm_zoo.model import ZooForCausalLM

MOST_POSITIONS = 131_072  # a Llama has to name a number; the zoo's rotary positions have no end
NAMES = {"mixer_norm.": "input_layernorm.", "mlp_norm.": "post_attention_layernorm.", "mixer.": "self_attn."}


def llama_config(config: ZooConfig) -> LlamaConfig:
    """The configuration of the Llama that computes what this transformer does; UserError where it is no such one."""
    used = dict.fromkeys(config.pattern[: config.num_hidden_layers])
    with torch.device("meta"):
        attention = config.build_mixer(next(iter(used)))
    if len(used) > 1 or not isinstance(attention, SoftmaxAttention):
        raise UserError(f"a model of the zoo is a transformer only with softmax attention throughout, got {list(used)}")
    if attention.window is not None:
        raise UserError(f"a Llama has no window: window={attention.window} cannot be kept")
    if config.intermediate_size == 0:
        raise UserError("a Llama has an MLP in every block, and this model has none (intermediate_size=0)")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_size,
        max_position_embeddings=MOST_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_base},
        rms_norm_eps=config.norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        dtype=config.dtype,
    )


def as_llama(model: ZooForCausalLM) -> LlamaForCausalLM:
    """A Llama that shares the weights of a softmax transformer of the zoo and gives the same logits.

    as_llama(ZooForCausalLM.from_pretrained("mine")).save_pretrained("mine-as-llama")
    """
    with no_init_weights(), model.device:
        llama = LlamaForCausalLM(llama_config(model.config))
    weights = {_renamed(name): value for name, value in model.state_dict(keep_vars=True).items()}
    llama.load_state_dict(weights, assign=True)
    llama.generation_config = copy.deepcopy(model.generation_config)
    return llama.train(model.training)


def _renamed(name: str) -> str:
    for ours, llamas in NAMES.items():
        name = name.replace(f".{ours}", f".{llamas}")
    return name
