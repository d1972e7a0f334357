"""Every way of decoding that transformers has, with a recurrent model and a hybrid: what works gives with a cache what
it gives without one, and what cannot work is refused in one line."""

import string
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)

VOCAB, NEW = 61, 10
LETTERS = (string.ascii_letters + string.digits)[:VOCAB]


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(1, VOCAB, 2), -torch.inf)


class AfterSixTokens(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


def allowed(row, ids):
    """Only tokens near the last one."""
    return [(ids[-1].item() + step) % (VOCAB - 1) + 1 for step in range(5)]


SAMPLE = {"do_sample": True, "top_k": 0}
METHODS = {
    "greedy": {},
    "sampling": SAMPLE,
    "top_k": {**SAMPLE, "top_k": 5, "temperature": 1.5},
    "top_p": {**SAMPLE, "top_p": 0.8},
    "min_p": {**SAMPLE, "min_p": 0.05},
    "typical_p": {**SAMPLE, "typical_p": 0.7},
    "top_h": {**SAMPLE, "top_h": 0.5},
    "epsilon and eta cutoff": {**SAMPLE, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "several samples": {**SAMPLE, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "beams, early stopping": {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0, "eos_token_id": 7},
    "sampled beams": {"num_beams": 3, **SAMPLE},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.1},
    "lengths": {"min_new_tokens": 6, "eos_token_id": list(range(1, 40)), "exponential_decay_length_penalty": (4, 1.5)},
    "forbidden and forced": {"bad_words_ids": [[5], [6, 7]], "begin_suppress_tokens": [9], "forced_eos_token_id": 3},
    "sequence_bias": {"sequence_bias": [[[11], 4.0], [[12, 13], -5.0]]},
    "watermark": {**SAMPLE, "watermarking_config": WatermarkingConfig(bias=4.0)},
    "guidance_scale": {"guidance_scale": 1.5},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "prefix_allowed_tokens_fn, beams": {"prefix_allowed_tokens_fn": allowed, "num_beams": 3},
    "logits_processor": {"logits_processor": LogitsProcessorList([OnlyEven()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([AfterSixTokens(), MaxTimeCriteria(600)])},
    "generation_config": {"generation_config": GenerationConfig(num_beams=2, no_repeat_ngram_size=3)},
    "renormalize_logits": {**SAMPLE, "renormalize_logits": True, "remove_invalid_values": True},
}
REFUSED = {
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search reads the hidden states"),
    "DoLa": ({"dola_layers": "low"}, "dola_generation reads the hidden states"),
    "diverse beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "requires `trust_remote_code"),
    "constrained beams": ({"num_beams": 3, "force_words_ids": [[5]]}, "requires `trust_remote_code"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "use a forward hook"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "use a forward hook"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation must be None, got 'static'"),
    "quantized cache": ({"cache_implementation": "quantized"}, "cache_implementation must be None, got 'quantized'"),
}


@pytest.fixture(params=["gated_deltanet", "hybrid"])
def model(request, make_model):
    return make_model(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    """Token n is the letter or digit n."""
    inner = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def generate(model, ids, seed=0, **options):
    torch.manual_seed(seed)  # transformers samples from the global generator
    if "generation_config" not in options:
        options = {"max_new_tokens": NEW, **options}
    else:
        options["generation_config"].update(max_new_tokens=NEW, pad_token_id=0)
    return model.generate(ids, **options)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_method_gives_with_a_cache_what_it_gives_without(model, tokens, options):
    ids = tokens(2, 6)
    written = generate(model, ids, **options)
    assert torch.equal(written, generate(model, ids, use_cache=False, **options))
    assert torch.equal(written[:, :6], ids.repeat_interleave(len(written) // 2, dim=0))


def test_methods_do_what_they_say(make_model, tokens):
    """So that a comparison of two equal errors is none."""
    model, ids = make_model("hybrid"), tokens(2, 6)
    plain = generate(model, ids)
    assert (generate(model, ids, **METHODS["logits_processor"])[:, 6:] % 2 == 0).all()
    assert generate(model, ids, **METHODS["stopping_criteria"]).shape[1] == 12
    for row in generate(model, ids, **METHODS["prefix_allowed_tokens_fn, beams"]):
        assert all(row[t].item() in allowed(0, row[:t]) for t in range(6, 16))
    for name in ("penalties", "sequence_bias", "guidance_scale", "beams, early stopping", "sampling", "watermark"):
        other = generate(model, ids, **METHODS[name])
        assert other.shape != plain.shape or not torch.equal(other, plain), name
    assert len(generate(model, ids, **METHODS["beams"])) == 6


def test_scores_and_their_sum(model, tokens):
    ids = tokens(2, 6)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for beams in ({}, {"num_beams": 3}):
        with_cache = generate(model, ids, **options, **beams)
        without = generate(model, ids, use_cache=False, **options, **beams)
        for name in ("scores", "logits"):
            assert len(with_cache[name]) == NEW
            assert all(map(torch.allclose, with_cache[name], without[name])), name
    greedy = generate(model, ids, **options)
    each = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
    assert torch.allclose(each, torch.stack([s.log_softmax(1).max(1).values for s in greedy.scores], dim=1))
    assert greedy.past_key_values.get_seq_length() == 6 + NEW - 1


def test_stop_strings(model, tokens, tokenizer):
    ids = tokens(1, 6)
    text = tokenizer.decode(generate(model, ids)[0, 6:])
    stop = text[3:5]  # of two tokens
    stopped = generate(model, ids, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0, 6:]) == text[: text.index(stop) + 2]


def test_streamers(model, tokens, tokenizer, capsys):
    ids = tokens(1, 6)
    expected = tokenizer.decode(generate(model, ids)[0, 6:])
    assert len(expected) == NEW
    generate(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer).strip() == expected
    thread.join()
    with pytest.raises(ValueError, match="streamer"):
        generate(model, ids, streamer=streamer, num_beams=2)


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_line(make_model, tokens, options, message):
    model = make_model("gated_deltanet")
    with pytest.raises(ValueError, match=message) as error:
        generate(model, tokens(2, 6), **options)
    assert "\n" not in str(error.value)


def test_a_row_that_ended_early_reads_padding(make_model, tokens):
    """Its text and the other rows are as they should be; its state is that of the text with the padding."""
    model, ids = make_model("gated_deltanet"), tokens(2, 6)
    free = generate(model, ids)
    eos = next(token for token in free[0, 6:].tolist() if token not in free[1])
    cache = model.init_cache(2)
    written = generate(model, ids, eos_token_id=eos, past_key_values=cache)
    padded = written[:, :-1]
    assert not padded[0, -1]
    read = model.init_cache(2)
    with torch.no_grad():
        model(padded, past_key_values=read)
    for state, other in zip(cache.states, read.states, strict=True):
        assert all(torch.allclose(state[name], other[name], rtol=1e-9, atol=1e-12) for name in state)
