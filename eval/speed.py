"""Speed and memory of a model at a given context length: training, decoding, and the bytes of state it decodes with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lm_zoo.causal_lm import PREFILL_CHUNK
from lm_zoo.model import ZooForCausalLM


@dataclass(frozen=True)
class DecodeSpeed:
    context: int
    tokens_per_second: float  # over the whole batch, from the median step
    state_bytes: int  # what the model keeps of the context, over the whole batch


@torch.inference_mode()
def decode_speed(model: ZooForCausalLM, context: int, *, batch_size: int = 1, steps: int = 32) -> DecodeSpeed:
    """Tokens per second of one-token steps that follow `context` tokens already read.

    The context is random tokens, read in chunks; the first steps are not counted. Dropout and gradients are off.
    Raises ValueError if context, batch_size or steps is below 1.
    """
    for name, value in (("context", context), ("batch_size", batch_size), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, context), generator=generator).to(model.device)
    cache = model.init_cache(batch_size)

    def feed(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    was_training = model.training
    model.eval()
    try:
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            feed(chunk)
        state_bytes = cache.nbytes
        seconds = median_seconds(lambda: feed(ids[:, :1]), warm_up=4, repeats=steps)
    finally:
        model.train(was_training)
    return DecodeSpeed(context, batch_size / seconds, state_bytes)


def training_speed(model: ZooForCausalLM, length: int, *, batch_size: int = 1, steps: int = 5) -> float:
    """Tokens per second of forward and backward passes over rows of `length` random tokens, from the median step.

    The optimiser is left out, and the gradients are cleared afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    was_training = model.training
    model.train()
    try:
        seconds = median_seconds(step, warm_up=1, repeats=steps)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return batch_size * length / seconds


def median_seconds(function: Callable[[], None], *, warm_up: int, repeats: int) -> float:
    """Median wall-clock time of a call, with the GPU's queue emptied before and after if there is one."""
    seconds = []
    for call in range(warm_up + repeats):
        _synchronize()
        start = time.perf_counter()
        function()
        _synchronize()
        if call >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
