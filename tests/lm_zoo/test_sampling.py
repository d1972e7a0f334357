"""Each row of a batch is sampled by its own options, from the distribution that transformers' warpers give."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lm_zoo.serving import Sampling
from lm_zoo.serving.sampling import Chooser

VOCABULARY = 40
OPTIONS = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"top_k": 5},
    {"top_k": 12, "top_p": 0.6, "temperature": 1.7},
    {"top_k": 1000, "top_p": 0.999},
    {"temperature": 1e-4},
]


@pytest.fixture
def logits():
    return 3 * torch.randn(len(OPTIONS), VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def warped(logits: torch.Tensor, options: dict) -> torch.Tensor:
    """The distribution by transformers, in its order: temperature, top_k, top_p."""
    scores = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits[None])
    if options.get("top_k"):
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if options.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    return scores[0].softmax(-1)


def test_draws_are_those_of_transformers(logits):
    chooser = Chooser([Sampling(**options) for options in OPTIONS], logits.device)
    draws = 4000
    found = torch.zeros_like(logits)
    for i in range(draws):
        tokens, _ = chooser.choose(logits, [(i + 0.5) / draws] * len(OPTIONS))
        found[torch.arange(len(OPTIONS)), tokens] += 1 / draws
    expected = torch.stack([warped(row, options) for row, options in zip(logits, OPTIONS, strict=True)])
    # u in equal steps: every token comes as often as its probability says, to within a step at either end.
    assert ((found - expected).abs() <= 1 / draws).all()
    assert (found[expected == 0] == 0).all()


def test_the_likeliest_beside_others(logits):
    options = [Sampling(temperature=0), Sampling(), Sampling(temperature=0, top_p=0.1), Sampling(top_k=1)]
    tokens, _ = Chooser(options, logits.device).choose(logits[:4], [0.999] * 4)
    best = logits[:4].argmax(-1).tolist()
    assert [tokens[row] for row in (0, 2, 3)] == [best[row] for row in (0, 2, 3)]
    assert tokens[1] != best[1]


def test_the_coldest_temperature_is_the_likeliest_token(logits):
    tokens, _ = Chooser([Sampling(temperature=1e-300)] * len(logits), logits.device).choose(logits.float(), [0.5] * 8)
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5, "top_k": 3}])
def test_a_row_that_is_not_finite_is_told_and_leaves_the_others_alone(logits, options):
    chooser = Chooser([Sampling(**options)] * 3, logits.device)
    whole, _ = chooser.choose(logits[:3], [0.3] * 3)
    broken = logits[:3].clone()
    broken[1, 7] = float("nan")
    tokens, _ = chooser.choose(broken, [0.3] * 3)
    assert tokens == [whole[0], None, whole[2]]


def test_logprobs_are_the_models_own(logits):
    options = [Sampling(temperature=0.1, logprobs=3), Sampling(), Sampling(temperature=0, logprobs=0)]
    tokens, logprobs = Chooser(options, logits.device).choose(logits[:3], [0.5] * 3)
    expected = logits[:3].log_softmax(-1)
    assert sorted(logprobs) == [0, 2]
    assert logprobs[0].logprob == pytest.approx(expected[0, tokens[0]].item())
    values, ids = expected[0].topk(3)
    assert [token for token, _ in logprobs[0].likeliest] == ids.tolist()
    assert [value for _, value in logprobs[0].likeliest] == pytest.approx(values.tolist())
    assert logprobs[2].likeliest == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be from 0 to 1e"),
        ({"temperature": float("nan")}, ValueError, "temperature must be"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.01}, ValueError, "top_p must be"),
        ({"top_k": -1}, ValueError, "top_k must be from 0"),
        ({"top_k": None}, TypeError, "top_k must be an integer"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be from 1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"logprobs": 21}, ValueError, "logprobs must be from 0 to 20"),
        ({"stop": "end"}, TypeError, "stop must be a tuple of strings"),
        ({"stop": ("",)}, ValueError, "stop must be at most 16 strings, each of 1 to 256 characters"),
        ({"stop": ("a" * 257,)}, ValueError, "stop must be"),
    ],
)
def test_refuses_impossible_options(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)
