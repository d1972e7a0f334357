"""Needles in a haystack as text, for any model with its tokenizer: facts among sentences that say nothing of them.

    The old miller waters the garden. ... The secret number of Ada is 48213. ... The quiet sailor counts the boats.
    The secret number of Ada is                                                                          -> 48213

Text and numbers are made of a seed; nothing is fetched. `dataset` is the same as documents for lm-eval, where the
likeliest of several numbers is the answer: the task `needle` of `lm-zoo eval harness`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.errors import UserError

NAMES = (
    *("Ada", "Ben", "Cora", "Dan", "Edith", "Finn", "Greta", "Hugo", "Ida", "Jonas", "Kira", "Leo", "Mara", "Nils"),
    *("Olga", "Paul", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Viktor", "Wanda", "Xenia", "Yann", "Zoe"),
)
ADJECTIVES = ("old", "quiet", "young", "tall", "tired", "happy", "careful", "strange", "clever", "slow")
PEOPLE = ("miller", "sailor", "teacher", "baker", "farmer", "painter", "doctor", "shepherd", "driver", "guest")
VERBS = ("waters", "counts", "paints", "watches", "repairs", "describes", "forgets", "admires", "cleans", "sells")
THINGS = ("garden", "boats", "windows", "road", "apples", "letters", "bridge", "horses", "chairs", "clouds")
PLACES = ("in the morning", "behind the house", "near the river", "after lunch", "without a word", "in the rain")


@dataclass(frozen=True)
class NeedleText:
    """A haystack and one question about it.

    Attributes:
        context: sentences, the facts among them.
        question: what follows the context, up to just before the answer.
        answer: with the space before it.
        choices: numbers to choose from: those of all facts, and others where these are too few. No spaces.
        depth: where the fact that is asked for stands, from 0 (first sentence) to 1 (last).
    """

    context: str
    question: str
    answer: str
    choices: tuple[str, ...]
    depth: float

    @property
    def prompt(self) -> str:
        return self.context + self.question


def needle_text(
    seed: int, *, sentences: int = 50, needles: int = 1, depth: float | None = None, choices: int = 4
) -> NeedleText:
    """One text: `sentences` of haystack with `needles` facts between them, one of which is asked for.

    depth: where that one stands among the sentences, in [0, 1]; by default anywhere. The others stand anywhere.
    choices: at least so many numbers to choose from.
    """
    for name, value, least in (("sentences", sentences, 0), ("needles", needles, 1), ("choices", choices, 1)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if needles > len(NAMES):
        raise UserError(f"needles must be at most {len(NAMES)}, one for each name, got {needles}")
    if depth is not None and not 0 <= depth <= 1:
        raise UserError(f"depth must be in [0, 1], got {depth}")
    draws = random.Random(seed)
    names = draws.sample(NAMES, needles)
    numbers = [str(number) for number in draws.sample(range(10_000, 100_000), max(needles, choices))]
    hay = [_sentence(draws) for _ in range(sentences)]
    places = [draws.randint(0, sentences) for _ in names]
    if depth is not None:
        places[0] = round(depth * sentences)
    facts = [f"The secret number of {name} is {number}." for name, number in zip(names, numbers, strict=False)]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        hay.insert(place, fact)
    answer = numbers[0]
    draws.shuffle(numbers)
    return NeedleText(
        context=" ".join(hay),
        question=f"\nThe secret number of {names[0]} is",
        answer=f" {answer}",
        choices=tuple(numbers),
        depth=places[0] / max(1, sentences),
    )


@torch.no_grad()
def needle_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[NeedleText]) -> float:
    """The share of `texts` whose answer greedy decoding gives to the last token. One forward pass for each."""
    if not texts:
        raise UserError("texts must hold at least one text")
    limit = getattr(model.config, "max_position_embeddings", None)
    right = 0
    for text in texts:
        prompt = tokenizer(text.prompt, verbose=False)["input_ids"]
        ids = tokenizer(text.prompt + text.answer, verbose=False)["input_ids"]
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"a text has {len(ids)} tokens, more than the model's {limit} positions; ask for fewer sentences"
            )
        answer = torch.tensor(ids[len(prompt) :])
        logits = model(torch.tensor([ids], device=model.device)).logits[0, len(prompt) - 1 : -1]
        right += torch.equal(logits.argmax(dim=-1).cpu(), answer)
    return right / len(texts)


def _sentence(draws: random.Random) -> str:
    words = [draws.choice(kinds) for kinds in (ADJECTIVES, PEOPLE, VERBS, THINGS, PLACES)]
    return "The {} {} {} the {} {}.".format(*words)


def dataset(
    *, texts: int = 100, sentences: int = 50, needles: int = 4, depth: float | None = None, seed: int = 0, **_: Any
) -> dict[str, Any]:
    """`texts` documents for a task file of lm-eval: `custom_dataset: !function lm_zoo.eval.needle_text.dataset`.

    lm-eval calls it with the file's `dataset_kwargs`, and with entries of its own, which mean nothing here.
    """
    from datasets import Dataset

    seeds = random.Random(seed)
    rows = []
    for _number in range(texts):
        text = needle_text(seeds.getrandbits(62), sentences=sentences, needles=needles, depth=depth)
        rows.append(
            {
                "context": text.context,
                "question": text.question,
                "choices": list(text.choices),
                "target": text.choices.index(text.answer.strip()),
                "depth": text.depth,
            }
        )
    return {"validation": Dataset.from_list(rows)}
