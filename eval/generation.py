"""Continuing a prompt token by token. The zoo's models keep a state of constant size while they do it."""

from __future__ import annotations

from typing import TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lm_zoo.errors import UserError


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    max_tokens: int = 200,
    stream: TextIO | None = None,
) -> str:
    """The prompt and its continuation, also written to `stream` word by word as it comes.

    temperature: 0 takes the likeliest token every time, otherwise tokens are sampled.
    top_p: sample among the likeliest tokens that hold this much of the probability, in (0, 1].
    seed: of this call alone; the global generators are left as they were.
    Raises ValueError for a prompt without tokens, and for options out of range.
    """
    if temperature < 0:
        raise UserError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], got {top_p}")
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}")
    ids = _prompt_ids(tokenizer, prompt).to(model.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_tokens > limit:
        raise UserError(
            f"prompt ({ids.shape[1]} tokens) and max_tokens ({max_tokens}) exceed the model's {limit} positions; "
            "shorten one of them"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    # transformers samples from the global generator only, so it is seeded inside a fork.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            pad_token_id=_first_given(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
            streamer=None if stream is None else _Streamer(tokenizer, stream),
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


class _Streamer(TextStreamer):
    """transformers' streamer, writing to any text stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.write(text + "\n" * stream_end)
        self.stream.flush()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Tokens of the prompt, [1, T]. An empty prompt starts where a document starts: at the tokenizer's own mark."""
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
    if ids.shape[1] == 0:
        start = _first_given(tokenizer.bos_token_id, tokenizer.eos_token_id)
        if start is None:
            raise UserError("the prompt is empty and the tokenizer has no start token; give a prompt")
        ids = torch.tensor([[start]])
    return ids


def _first_given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
