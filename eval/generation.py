"""Continuing a prompt token by token. The zoo's models keep a state of constant size while they do it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lm_zoo.cache import ZooCache
from lm_zoo.cache_files import load_cache, model_hash, save_cache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.errors import UserError
from lm_zoo.eval.report import check_writable
from lm_zoo.speculative import speculate


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
    state: str | Path | None = None,
    speculation: dict[str, Any] | None = None,
) -> str:
    """The prompt and its continuation, also written to `stream` word by word as it comes.

    temperature: 0 takes the likeliest token every time, otherwise tokens are sampled.
    top_p: sample among the likeliest tokens that hold this much of the probability, in (0, 1].
    seed: of this call alone; the global generators are left as they were.
    state: a file to go on from, where there is one: the text is then that of earlier calls with the prompt at its end,
        of which the prompt and what follows are returned. The file then holds where this call stopped.
    speculation: how `lm_zoo.speculative.speculate` guesses: {"draft": model}, {"lookup": 3} or {"early_layers": 2}.
    Raises ValueError for a prompt without tokens, and for options out of range.
    """
    if temperature < 0:
        raise UserError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], got {top_p}")
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}")
    session = None if state is None else _Session.open(state, model)
    unread = None if session is None else session.unread
    ids = _prompt_ids(tokenizer, prompt, unread).to(model.device)
    past, shown = (0 if session is None else session.cache.length), (0 if unread is None else unread.shape[1])
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and past + ids.shape[1] + max_tokens > limit:
        before = f"state ({past} tokens), " if past else ""
        raise UserError(
            f"{before}prompt ({ids.shape[1]} tokens) and max_tokens ({max_tokens}) exceed the model's {limit} "
            "positions; shorten one of them"
        )
    pad = _first_given(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    streamer = None if stream is None else _Streamer(tokenizer, stream, shown)
    cache = None if session is None else session.cache
    if speculation is not None:
        output = speculate(
            model,
            ids,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator(model.device).manual_seed(seed),
            pad_token_id=pad,
            past_key_values=cache,
            streamer=streamer,
            **speculation,
        ).ids
        if session is not None:
            session.close(output[:, cache.length - past :])
        return tokenizer.decode(output[0, shown:], skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    # transformers samples from the global generator only, so it is seeded inside a fork.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            # With the tokens of the state: transformers then knows that `ids` are the new ones only.
            attention_mask=ids.new_ones(1, past + ids.shape[1]),
            past_key_values=cache,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    if session is not None:
        session.close(output[:, session.cache.length - past :])
    return tokenizer.decode(output[0, shown:], skip_special_tokens=True)


@dataclass
class _Session:
    """A cache that outlives the process, and the tokens that were written but not read yet: the last one."""

    path: Path
    model_id: str
    cache: ZooCache
    unread: Tensor | None = None

    @classmethod
    def open(cls, path: str | Path, model: PreTrainedModel) -> _Session:
        path = Path(path)
        if not isinstance(model, CausalLM):
            raise UserError(
                f"state needs a model of lm_zoo, got a {type(model).__name__}; linearize it, or leave it out"
            )
        check_writable(path)
        model_id = model_hash(model)
        if not path.exists():
            return cls(path, model_id, model.init_cache(1))
        cache, unread = load_cache(path, model, model_id)
        if unread is None or cache.batch_size != 1:
            raise UserError(f"{path} holds a cache, but not of a text that was being generated; name another file")
        return cls(path, model_id, cache, unread)

    def close(self, unread: Tensor) -> None:
        save_cache(self.path, self.cache, self.model_id, unread)


class _Streamer(TextStreamer):
    """transformers' streamer, writing to any text stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO, skip: int):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stream = stream
        self.skip = skip  # tokens that come first and were shown before

    def put(self, value: Tensor) -> None:
        value, self.skip = value[..., self.skip :], 0
        if value.numel():
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.write(text + "\n" * stream_end)
        self.stream.flush()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, unread: Tensor | None = None) -> Tensor:
    """Tokens of the prompt, [1, T]. An empty prompt starts where a document starts: at the tokenizer's own mark.

    After `unread` [1, n] the prompt goes on within the document, so it gets no mark and may be empty.
    """
    marks = unread is None
    ids = tokenizer(prompt, return_tensors="pt", verbose=False, add_special_tokens=marks)["input_ids"].long()
    if unread is not None:
        return torch.cat([unread.to(ids.device), ids], dim=1)
    if ids.shape[1] == 0:
        start = _first_given(tokenizer.bos_token_id, tokenizer.eos_token_id)
        if start is None:
            raise UserError("the prompt is empty and the tokenizer has no start token; give a prompt")
        ids = torch.tensor([[start]])
    return ids


def _first_given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
