"""Streaming generation."""

import io

import pytest
import torch

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.generation import generate
from lm_zoo.train.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    config = ZooConfig.preset("hybrid-tiny", vocab_size=258, hidden_size=32, num_hidden_layers=2, initializer_range=0.2)
    return ZooForCausalLM(config).eval(), byte_tokenizer()


def test_greedy_is_the_argmax_of_uncached_logits(parts):
    model, tokenizer = parts
    ids = tokenizer("To be, or", return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    text = generate(model, tokenizer, "To be, or", temperature=0, max_tokens=12)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_stream_gets_the_text_in_pieces(parts):
    pieces = []

    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    text = generate(*parts, "the same words and the same words", max_tokens=30, stream=Recorder())
    assert "".join(pieces) == text + "\n"
    assert len(pieces) > 10


def test_seed_decides_and_global_generators_stay(parts):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = [generate(*parts, "abc", seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert texts[0] == texts[1] != texts[2]


def test_empty_prompt_starts_a_document(parts):
    assert len(generate(*parts, "", max_tokens=20)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_refuses_options_out_of_range(parts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*parts, "a", **options)
