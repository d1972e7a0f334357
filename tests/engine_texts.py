"""Texts for an engine, what it should make of them, and ways to hold it while a test looks."""

import threading

import torch

from lm_zoo.serving import Sampling
from lm_zoo.train.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = 258
LENGTHS = [5, 18, 33, 7, 1, 2, 21, 11]  # of the prompts
COUNTS = [5, 14, 3, 9, 1, 12, 6, 10]  # of the texts
GREEDY = {"temperature": 0}


def prompts_of(lengths, seed=1, low=1, high=256):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=draws).tolist() for length in lengths]


def generated(model, prompt: list[int], count: int) -> list[int]:
    """The text of `model.generate` alone."""
    end = TOKENIZER.eos_token_id
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return output[0, len(prompt) :].tolist()


def check_greedy(model, engine, prompts, counts):
    requests = [engine.submit(p, Sampling(max_tokens=n, **GREEDY)) for p, n in zip(prompts, counts, strict=True)]
    for request, prompt, count in zip(requests, prompts, counts, strict=True):
        result = request.result()
        assert list(result.tokens) == generated(model, prompt, count)
        assert result.finish_reason == ("stop" if result.tokens[-1] == TOKENIZER.eos_token_id else "length")
        text = TOKENIZER.decode(prompt + list(result.tokens), skip_special_tokens=True)
        assert text.endswith(result.text)
        assert result.prompt_tokens == len(prompt)


class Listener:
    """A listener that lets a test look at a text when it has so many tokens."""

    def __init__(self, count: int = 1):
        self.pieces, self.count, self.reached = [], count, threading.Event()

    def __call__(self, piece) -> None:
        self.pieces.append(piece)
        if len(self.pieces) >= self.count:
            self.reached.set()


class Gate:
    """Holds the engine's thread in the model until it is opened; `calls` counts how often it came there."""

    def __init__(self, model):
        self.open, self.calls, self.entered = threading.Event(), 0, threading.Event()
        hidden_states = model.hidden_states

        def gated(*args, **kwargs):
            self.calls += 1
            self.entered.set()
            assert self.open.wait(20)
            return hidden_states(*args, **kwargs)

        model.hidden_states = gated
