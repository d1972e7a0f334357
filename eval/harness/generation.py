"""Texts that go on until a stop string, each from a state that texts with the same beginning share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import CausalLM
from lm_zoo.eval.harness.memory import check_memory
from lm_zoo.eval.harness.scoring import walk

if TYPE_CHECKING:
    from lm_zoo.eval.harness.adapter import HarnessLM

NEW_TOKENS = 256  # lm-eval's, where a task does not say


class StopAtText(StoppingCriteria):
    """A row ends as soon as one of the strings stands in what was written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int):
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.prompt = prompt
        # A token that is no special one is a byte or more, and the first one may hold only the end of one.
        self.reach = max((len(stop.encode()) for stop in self.stops), default=0) + 2

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        written = self.tokenizer.batch_decode(input_ids[:, self.prompt :][:, -self.reach :])
        ended = [any(stop in text for stop in self.stops) for text in written]
        return torch.tensor(ended, device=input_ids.device)


def continuations(
    lm: HarnessLM, requests: Sequence[tuple[str, dict[str, Any]]], done: Callable[[int], None]
) -> list[str]:
    """What the model writes after each context; the options are those of lm-eval's tasks (until, max_gen_toks ...)."""
    answers = [""] * len(requests)
    kinds: dict[str, list[int]] = {}
    for number, (_, options) in enumerate(requests):
        kinds.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(number)
    for numbers in kinds.values():
        options = normalize_gen_kwargs(requests[numbers[0]][1], NEW_TOKENS)
        eos = lm.tokenizer.eos_token_id
        end_of_text = None if eos is None else lm.tokenizer.decode(eos)
        stops = handle_stop_sequences(options.pop("until", None), eos=end_of_text)
        room = options.pop("max_gen_toks")
        texts = [lm.shortened(lm.tok_encode(lm.given(requests[number][0])), room) for number in numbers]
        texts = [text or [lm.prefix_token_id] for text in texts]
        for members, written in _written(lm, texts, stops, room, _sampling(options)):
            for member, tokens in zip(members, written, strict=True):
                text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
                answers[numbers[member]] = postprocess_generated_text(text, stop=stops, think_end_token=None)
            done(len(members))
    return answers


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate`, where greedy is spelled without those of sampling."""
    options = {name: value for name, value in options.items() if name != "max_length"}
    if not options.get("do_sample"):
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options


@torch.inference_mode()
def _written(lm: HarnessLM, texts: Sequence[list[int]], stops: Sequence[str], room: int, sampling: dict[str, Any]):
    """Yields members and what was written after each, in some order."""
    forks = isinstance(lm.model, CausalLM) and not lm.prefix
    shared = [number for number, text in enumerate(texts) if len(text) > 1] if forks else []
    # Reading a text stops before its last token, which generate() reads itself.
    steps = walk(
        lm.reader,
        [texts[number][:-1] for number in shared],
        batch_size=lm.batch_size,
        keep_ends=True,
        wanted=lambda node: [],
        work=lm.work,
    )
    for nodes, memory, _ in steps:
        rows = [
            (row, shared[member])
            for row, node in enumerate(nodes)
            for member in node.members
            if node.end == len(texts[shared[member]]) - 1
        ]
        for start in range(0, len(rows), lm.batch_size):
            index, members = zip(*rows[start : start + lm.batch_size], strict=True)
            cache = memory.select(torch.tensor(index, device=lm.model.device))
            yield members, _generate(lm, [texts[member] for member in members], stops, room, sampling, cache)
    rest = sorted(set(range(len(texts))) - set(shared), key=lambda number: -len(texts[number]))
    for start in range(0, len(rest), lm.batch_size):
        members = rest[start : start + lm.batch_size]
        read = sum(len(texts[member]) for member in members)
        lm.work.asked, lm.work.read = lm.work.asked + read, lm.work.read + read
        yield members, _generate(lm, [texts[member] for member in members], stops, room, sampling, None)


def _generate(
    lm: HarnessLM,
    texts: Sequence[list[int]],
    stops: Sequence[str],
    room: int,
    sampling: dict[str, Any],
    cache: ZooCache | None,
) -> list[list[int]]:
    length = max(map(len, texts))
    if cache is None:
        check_memory(lm.model, len(texts), length, 1)
    else:
        cache.length = length - 1  # of the padded texts, of which generate() then reads the last column
    tokenizer, device = lm.tokenizer, lm.model.device
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = torch.tensor([[pad] * (length - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts], device=device)
    if lm.prefix:
        sampling = sampling | {"prefix_length": mask.sum(dim=1)}
    output = lm.model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=room,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([StopAtText(tokenizer, stops, length)]),
        **sampling,
    )
    return output[:, length:].tolist()
