"""Perplexity against its definition, computed token by token."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval import perplexity as module
from lm_zoo.eval.perplexity import perplexity, sum_nats
from lm_zoo.train.tokenizers import byte_tokenizer

TEXT = "Whether 't is nobler in the mind to süffer the slings and arrows of outrageous fortune, or to take arms. " * 2


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def zoo():
    torch.manual_seed(0)
    config = ZooConfig.preset("hybrid-tiny", vocab_size=258, hidden_size=32, num_hidden_layers=2, initializer_range=0.1)
    return ZooForCausalLM(config).double().eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=512, initializer_range=0.1, **sizes)
    return LlamaForCausalLM(config).double().eval()


MODELS = pytest.mark.parametrize("build", [zoo, llama])


@torch.no_grad()
def by_definition(model, ids: torch.Tensor, context: int, stride: int) -> float:
    """Each token's loss from its own forward pass over what it may see."""
    nats = 0.0
    for t in range(1, len(ids)):
        start = 0
        while start + context <= t:  # the first window that holds t
            start += stride
        logits = model(input_ids=ids[None, start:t]).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[t]].item()
    return nats


@MODELS
@pytest.mark.parametrize(("context", "stride"), [(16, 1), (16, 5), (16, 8), (16, 15), (2, 1), (39, 20), (40, 20)])
def test_every_token_counts_once_in_its_first_window(build, context, stride):
    model = build()
    ids = torch.randint(258, (40,), generator=torch.Generator().manual_seed(1))
    actual = sum_nats(model, ids, context=context, stride=stride)
    assert actual == pytest.approx(by_definition(model, ids, context, stride), rel=1e-6)


@MODELS
def test_text_in_one_window_has_its_plain_loss_whatever_the_stride(build, tokenizer):
    model = build()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    for stride in (1, 100, 299):
        result = perplexity(model, tokenizer, TEXT, context=300, stride=stride)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
        assert result.tokens == ids.shape[1] - 1


def test_bits_per_byte_is_per_byte_of_utf8(tokenizer):
    result = perplexity(zoo(), tokenizer, TEXT, context=64)
    assert result.bytes == len(TEXT.encode()) > len(TEXT)
    bits = math.log2(result.perplexity) * result.tokens
    assert result.bits_per_byte == pytest.approx(bits / result.bytes, rel=1e-9)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer):
    model = zoo()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, tokenizer, TEXT, context=32)
    assert result.perplexity == pytest.approx(258, rel=1e-6)


def test_slices_and_batches_do_not_change_the_number(tokenizer, monkeypatch):
    expected = [perplexity(build(), tokenizer, TEXT, context=32, stride=7).nats for build in (zoo, llama)]
    monkeypatch.setattr(module, "TOKENS_PER_CALL", 1)
    monkeypatch.setattr(module, "LOGIT_ROWS", 5)
    actual = [perplexity(build(), tokenizer, TEXT, context=32, stride=7).nats for build in (zoo, llama)]
    assert actual == pytest.approx(expected, rel=1e-7)  # slices are summed in float32


def test_default_context_respects_the_models_positions(tokenizer):
    assert perplexity(llama(), tokenizer, TEXT).context == 512
    assert perplexity(zoo(), tokenizer, TEXT).context == 2048


def test_result_fits_into_json(tokenizer):
    model = zoo()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)  # a broken model: exp of its loss overflows
    result = perplexity(model, tokenizer, TEXT, context=32)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["tokens"] == result.tokens


@pytest.mark.parametrize(
    ("text", "windows", "message"),
    [
        ("", {}, "0 tokens long"),
        ("a", {}, "1 tokens long"),
        (TEXT, {"context": 1}, "context must be at least 2"),
        (TEXT, {"context": 513}, "exceeds the model's 512 positions"),
        (TEXT, {"context": 8, "stride": 0}, "stride must be from 1 to context - 1 = 7"),
        (TEXT, {"context": 8, "stride": 8}, "stride must be from 1 to context - 1 = 7"),
    ],
)
def test_refuses_what_it_cannot_measure(tokenizer, text, windows, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama(), tokenizer, text, **windows)


def prefix_model(mixer="linear_attention"):
    torch.manual_seed(0)
    config = ZooConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, mixers={mixer: {"num_heads": 2}}
    )
    return ZooForCausalLM(config).double().eval()


@pytest.mark.parametrize(("context", "stride", "prefix"), [(16, 5, 11), (16, 8, 3), (40, 20, 20), (50, 1, 30)])
def test_what_comes_after_a_prefix_counts(context, stride, prefix, tokenizer):
    model, text = prefix_model(), TEXT[:40]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    result = perplexity(model, tokenizer, text, context=context, stride=stride, prefix_length=prefix)
    nats = 0.0
    for t in range(prefix, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if t < start + context)
        logits = model(input_ids=ids[None, start:t], prefix_length=prefix).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[t]].item()
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert (result.tokens, result.prefix_length) == (len(ids) - prefix, prefix)
    assert result.bytes == len(text.encode()) - prefix  # of a tokenizer of bytes


def test_impossible_prefixes_are_refused(tokenizer):
    for model, options, message in [
        (prefix_model(), {"context": 16, "stride": 8, "prefix_length": 9}, "from 0 to context - stride = 8, got 9"),
        (prefix_model(), {"context": 500, "prefix_length": 230}, "the text is .* perplexity needs at least 231"),
        (prefix_model("gla"), {"context": 16, "prefix_length": 4}, "prefix_length needs a layer whose state"),
        (llama(), {"context": 16, "prefix_length": 4}, "prefix_length is for models of lm_zoo"),
    ]:
        with pytest.raises(ValueError, match=message):
            perplexity(model, tokenizer, TEXT, **options)
