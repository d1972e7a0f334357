"""The rounds of speculative decoding: guess, read the guesses in one call, keep what the model agrees with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.speculative.acceptance import Sampling, accept
from lm_zoo.speculative.calls import Calls
from lm_zoo.speculative.drafts import Draft, EarlyLayers, Lookup, ModelDraft


@dataclass(frozen=True)
class Speculation:
    """What `speculate` wrote, and how well it was guessed.

    Attributes:
        ids: `[B, T + longest]`, the prompts with their continuations, padded on the right.
        rounds: how many calls of the model, after the one that read the prompts.
        guessed: guesses that it read in rows that were not over yet.
        accepted: how many of them are in the text.
    """

    ids: Tensor
    rounds: int
    guessed: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share of the guesses that stayed; 0 if there were none."""
        return self.accepted / max(1, self.guessed)


@torch.no_grad()
def speculate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    draft: CausalLM | None = None,
    lookup: int | None = None,
    early_layers: int | None = None,
    tokens: int = 5,
    max_new_tokens: int = 200,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    past_key_values: ZooCache | None = None,
    streamer: BaseStreamer | None = None,
) -> Speculation:
    """Continue texts as `model.generate` would, in fewer calls of the model.

    Without sampling the tokens are those of `generate`, up to ties within the rounding; with sampling they have the
    same distribution. Rows of a batch accept each their own number of guesses.

    Args:
        input_ids: `[B, T]`, padded on the left if at all.
        draft: a model with the same vocabulary that guesses. One of `draft`, `lookup` and `early_layers` is given.
        lookup: guess what followed the last tokens before in the same text: up to so many tokens.
        early_layers: guess with so many of the model's own first layers, and its head.
        tokens: K, guesses per call of the model.
        max_new_tokens: tokens written per row, at most.
        attention_mask: `[B, T]`, 0 at padding.
        temperature, top_k, top_p: see `Sampling`; the default is not to sample.
        eos_token_id: ends a row, wherever in the guesses it stands; by default the generation config's.
        pad_token_id: after the end of a row; by default the generation config's, else the end of text, else 0.
        generator: where random numbers come from.
        past_key_values: a cache that has read what comes before `input_ids`; it then has read all that is in the result
            but the last token of each row. A draft model sees `input_ids` alone.
        streamer: told of the prompt and of the tokens of each round, as by `generate`; for one row.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, input_ids, attention_mask, tokens, max_new_tokens, streamer)
    cache = model.init_cache(len(input_ids)) if past_key_values is None else past_key_values
    texts = _unpadded(input_ids, attention_mask)
    drafting = _new_draft(
        model, cache, texts, input_ids, attention_mask, draft, lookup, early_layers, sampling, generator
    )
    ends = _ends(eos_token_id, model)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    written: list[list[int]] = [[] for _ in texts]
    going, rounds, guessed, accepted = set(range(len(texts))), 0, 0, 0
    _read(model, input_ids, attention_mask, cache)
    calls = Calls(model, cache)
    try:
        while going:
            left = max_new_tokens - min(len(written[row]) for row in going)
            guesses, q = drafting.guess(texts, tokens) if left > 1 else (input_ids[:, :0], None)
            calls.record()
            last = torch.tensor([text[-1:] for text in texts], device=guesses.device)
            logits = calls(torch.cat([last, guesses], dim=1))
            kept, following = accept(logits, guesses, q, sampling, generator)
            new = [
                [*row[:count], token]
                for row, count, token in zip(guesses.tolist(), kept.tolist(), following.tolist(), strict=True)
            ]
            counts = [0] * len(texts)  # of what is over, nothing more is kept
            for row in sorted(going):
                part = _until_end(new[row], ends)[: max_new_tokens - len(written[row])]
                counts[row] = len(part)
                written[row] += part
                texts[row] += part
                guessed, accepted = guessed + guesses.shape[1], accepted + min(len(part), len(new[row]) - 1)
                if streamer is not None:
                    streamer.put(torch.tensor(part))
                if len(written[row]) == max_new_tokens or part[-1] in ends:
                    going.remove(row)
            rounds += 1
            calls.keep(counts)
            if left > 1:
                drafting.settle(counts)
    finally:
        cache.settle()
    if streamer is not None:
        streamer.end()
    ids = _padded(input_ids, written, _pad(pad_token_id, ends, model))
    return Speculation(ids, rounds, guessed, accepted)


def _check(model, input_ids, attention_mask, tokens, max_new_tokens, streamer) -> None:
    if not isinstance(model, CausalLM):
        raise TypeError(f"model must be a model of lm_zoo, whose cache can go back, got a {type(model).__name__}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, T] with at least one token, got {list(input_ids.shape)}")
    for name, value in (("tokens", tokens), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be [B, T] = {list(input_ids.shape)}, got {list(attention_mask.shape)}"
            )
        if not attention_mask[:, -1].all():
            raise ValueError("attention_mask must be 1 in the last column: pad on the left")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"streamer is for one text, got {len(input_ids)} rows: leave it out")


def _new_draft(
    model, cache, texts, input_ids, attention_mask, draft, lookup, early_layers, sampling, generator
) -> Draft:
    """The one of the three that is asked for, which has read the prompts where it has to."""
    given = {"draft": draft, "lookup": lookup, "early_layers": early_layers}
    given = [name for name, value in given.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of draft, lookup and early_layers, got {' and '.join(given) or 'none of them'}")
    if lookup is not None:
        if isinstance(lookup, bool) or not isinstance(lookup, int) or lookup < 1:
            raise ValueError(f"lookup must be a number of tokens of at least 1, got {lookup!r}")
        return Lookup(texts, lookup, input_ids.device)
    if early_layers is not None:
        return EarlyLayers(model, cache, early_layers, sampling, generator)
    check_draft(draft, model)
    draft_cache = draft.init_cache(len(input_ids))
    _read(draft, input_ids, attention_mask, draft_cache)
    return ModelDraft(draft, draft_cache, sampling, generator)


def check_draft(draft: CausalLM, model: CausalLM) -> None:
    """Whether a draft can guess for a model: ValueError or TypeError names both."""
    if not isinstance(draft, CausalLM):
        raise TypeError(f"draft must be a model of lm_zoo, whose cache can go back, got a {type(draft).__name__}")
    own, of_draft = model.config.vocab_size, draft.config.vocab_size
    if own != of_draft:
        raise ValueError(
            f"draft must have the model's vocabulary: {_name(draft)} has {of_draft:,} tokens, {_name(model)} {own:,}; "
            "train the draft with the model's tokenizer"
        )
    if draft.device != model.device:
        raise ValueError(f"draft must be where the model is, on {model.device}, got {draft.device}")


def _name(model: CausalLM) -> str:
    return getattr(model.config, "_name_or_path", "") or f"this {type(model).__name__}"


def _read(model: CausalLM, input_ids: Tensor, attention_mask: Tensor | None, cache: ZooCache) -> None:
    """All of the prompts but their last tokens."""
    if input_ids.shape[1] > 1:
        mask = None if attention_mask is None else attention_mask[:, :-1]
        model(input_ids[:, :-1], mask, past_key_values=cache, logits_to_keep=1)


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def _ends(eos_token_id: int | list[int] | None, model: CausalLM) -> list[int]:
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _pad(pad_token_id: int | None, ends: list[int], model: CausalLM) -> int:
    for token in (pad_token_id, model.generation_config.pad_token_id, *ends[:1]):
        if token is not None:
            return token
    return 0


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first end of text, itself included."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def _padded(input_ids: Tensor, written: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, written))
    rows = [row + [pad] * (longest - len(row)) for row in written]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
