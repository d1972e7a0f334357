"""Perplexity of a causal language model on a text, in strided windows.

    perplexity = exp( -1/(n-1) sum_{t=1}^{n-1} log p(x_t | x_{s(t)} .. x_{t-1}) )
    bits per byte = -sum_t log2 p(x_t | ...) / bytes of the text

`n` tokens are read in windows of `context` tokens that start every `stride` tokens. A window counts the tokens that no
earlier window counted, so every token after the first is counted exactly once, and after the first window each one has
seen at least `context - stride` tokens. The definition is the same for models with a state and without; if the text
fits into one window it is the plain perplexity of the whole text. The first token is context only, unless the tokenizer
puts one of its own before the text.

With a `prefix_length` M, the first M tokens of each window are a prefix, which sees all of itself (see `PrefixMixer`);
what is counted comes after it: all but the first M tokens of the text.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.causal_lm import CausalLM
from lm_zoo.errors import UserError

DEFAULT_CONTEXT = 2048
TOKENS_PER_CALL = 8192  # windows are batched up to this many tokens
LOGIT_ROWS = 1024  # rows of logits that are upcast to float32 at a time


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    bits_per_byte: float
    nats: float  # the summed negative log-likelihood
    tokens: int  # tokens counted: all but the first, or the first prefix
    bytes: int  # of the text in UTF-8, or of what comes after the first prefix
    context: int
    stride: int
    prefix_length: int = 0

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    prefix_length: int = 0,
) -> Perplexity:
    """Perplexity of `model` on `text`; see the module's docstring for the definition.

    context: tokens per window, at least 2; default 2,048, or the model's max_position_embeddings if that is less.
    stride: tokens from one window to the next, 1 to context - 1; default context // 2.
    prefix_length: tokens at the start of each window that see all of each other, up to context - stride; 0 for none.
    Raises ValueError for a text of fewer than two tokens and for impossible windows.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if context < 2:
        raise UserError(f"context must be at least 2 tokens (one to see, one to predict), got {context}")
    if limit is not None and context > limit:
        raise UserError(f"context {context} exceeds the model's {limit} positions; choose at most {limit}")
    if stride is None:
        stride = context // 2
    if not 1 <= stride < context:
        raise UserError(f"stride must be from 1 to context - 1 = {context - 1}, got {stride}")
    if not 0 <= prefix_length <= context - stride:
        raise UserError(f"prefix_length must be from 0 to context - stride = {context - stride}, got {prefix_length}")
    if prefix_length and not isinstance(model, CausalLM):
        raise UserError(f"prefix_length is for models of lm_zoo, this one is a {type(model).__name__}: leave it out")
    # verbose=False: a text longer than the model's context is the point here, not a mistake to warn of
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    least = max(1, prefix_length) + 1
    if len(ids) < least:
        raise UserError(f"the text is {len(ids)} tokens long; perplexity needs at least {least}")

    nats = sum_nats(model, ids, context=context, stride=stride, prefix_length=prefix_length)
    counted = tokenizer.decode(ids[prefix_length:], clean_up_tokenization_spaces=False) if prefix_length else text
    tokens, size = len(ids) - max(1, prefix_length), len(counted.encode())
    return Perplexity(
        perplexity=_exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / size,
        nats=nats,
        tokens=tokens,
        bytes=size,
        context=context,
        stride=stride,
        prefix_length=prefix_length,
    )


@torch.inference_mode()
def sum_nats(model: PreTrainedModel, ids: Tensor, *, context: int, stride: int, prefix_length: int = 0) -> float:
    """The negative log-likelihood in nats of `ids[1:]`, each token counted in the first window that holds it.

    With a prefix, of the tokens after the first one.
    """
    total = 0.0
    windows = [(0, max(1, prefix_length))]  # (start, first position that counts)
    while windows[-1][0] + context < len(ids):
        start = windows[-1][0] + stride
        windows.append((start, start - stride + context))
    # Full windows share calls; the last one is usually shorter and goes alone.
    is_zoo = isinstance(model, CausalLM)
    batch = max(1, TOKENS_PER_CALL // context) if is_zoo else 1
    full, last = windows[:-1], windows[-1:]
    for group in [*(full[i : i + batch] for i in range(0, len(full), batch)), last]:
        rows = torch.stack([ids[start : start + context] for start, _ in group]).to(model.device)
        for nats, (start, first) in zip(token_nats(model, rows, prefix_length), group, strict=True):
            total += nats[first - start - 1 :].double().sum().item()
    return total


@torch.inference_mode()
def token_nats(model: PreTrainedModel, rows: Tensor, prefix_length: int = 0) -> Tensor:
    """The negative log-likelihood in nats of `rows[:, 1:]`, each token given those before: `[B, T - 1]`, float32.

    A model of the zoo never builds the logits of a whole window. Any other gives its own logits, because some cap or
    scale them, and they are upcast a slice at a time.
    """
    targets = rows[:, 1:]
    if isinstance(model, CausalLM):
        hidden = model.hidden_states(rows, prefix_length=prefix_length or None)[:, :-1].flatten(0, 1)
        return model.head_loss(hidden, targets.flatten(), reduction="none").view(targets.shape)
    logits = model(input_ids=rows, use_cache=False).logits
    slices = zip(logits[:, :-1].split(LOGIT_ROWS, dim=1), targets.split(LOGIT_ROWS, dim=1), strict=True)
    losses = [F.cross_entropy(a.flatten(0, 1).float(), b.flatten(), reduction="none").view(b.shape) for a, b in slices]
    return torch.cat(losses, dim=1)


def _exp(nats_per_token: float) -> float:
    """exp, but the largest float instead of an overflow: a broken model still gets a number that JSON can hold."""
    return math.exp(min(nats_per_token, 709.0))
