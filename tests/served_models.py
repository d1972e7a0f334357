"""A tiny model to serve, and a tokenizer whose texts do not end."""

import torch

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.train.tokenizers import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    "{% endfor %}<assistant>"
)
MIXERS = {"gla": {"num_heads": 2}, "local": {"type": "attention", "num_heads": 4, "window": 5}}


def tiny_model() -> ZooForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.3}
    return ZooForCausalLM(ZooConfig(**sizes, mixers=MIXERS, pattern=["gla", "local"])).double().eval()


def endless_tokenizer():
    """Without an end token, so that texts are as long as is asked for; with a template for chats."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = TEMPLATE
    return tokenizer
