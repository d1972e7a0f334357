"""Speculative decoding writes what plain decoding writes: the same tokens, or tokens of the same distribution."""

import copy
import itertools

import pytest
import torch
from tiny_teachers import new_teacher

from lm_zoo import LinearizedForCausalLM, ZooConfig, ZooForCausalLM
from lm_zoo.speculative import Sampling, accept, early_exit, speculate


def nearly(model, noise=0.03):
    """A model that often agrees with `model`, and often does not."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += (
                noise * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    return other


def drafts(model):
    return {"draft": {"draft": nearly(model)}, "lookup": {"lookup": 2}, "early_layers": {"early_layers": 2}}


def padded(tokens):
    """Three prompts of 9, 4 and 8 tokens, padded on the left."""
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :5] = mask[2, :1] = 0
    return ids * mask, mask


def test_rows_that_accept_different_numbers_write_what_generate_writes(model, tokens):
    model.generation_config.suppress_tokens = None
    ids, mask = padded(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 20}
    free = model.generate(ids, **options)
    end = free[1, 16].item()  # one that row 1 really writes
    expected = model.generate(ids, eos_token_id=end, **options)
    agreed = {}
    for name, draft in drafts(model).items():
        found = speculate(model, ids, tokens=4, eos_token_id=end, **options, **draft)
        assert found.ids.tolist() == expected.tolist(), name
        agreed[name] = found.acceptance
    assert 0.1 < agreed["draft"] < 0.95  # else the test tests little


def test_transformers_assisted_generation(model, tokens):
    ids = tokens(1, 21)
    expected = model.generate(ids, max_new_tokens=16)
    assert torch.equal(model.generate(ids, max_new_tokens=16, assistant_model=nearly(model)), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=3), expected)


def test_transformers_assisted_generation_goes_on_from_a_cache(make_model, tokens):
    model, ids = make_model("hybrid"), tokens(1, 30)
    draft, cache = nearly(model), model.init_cache(1)
    first = model.generate(ids, max_new_tokens=10, past_key_values=cache, assistant_model=draft)
    assert not cache.recording
    assert cache.length == first.shape[1] - 1
    second = model.generate(first, max_new_tokens=10, past_key_values=cache, assistant_model=early_exit(model, 2))
    assert torch.equal(second, model.generate(ids, max_new_tokens=20))
    with pytest.raises(ValueError, match="different tokenizers"):
        model.generate(ids, max_new_tokens=3, assistant_model=make_model("hybrid", vocab_size=62))


@pytest.mark.parametrize("mixer", ["hybrid", "liger", "gated_deltanet"])
def test_linearized_models(mixer):
    student = LinearizedForCausalLM.from_teacher(new_teacher("llama"), mixer, keep_layers=[1]).double().eval()
    ids = torch.randint(1, student.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    student.generation_config.suppress_tokens = None
    expected = student.generate(ids, max_new_tokens=16)
    for draft in ({"draft": nearly(student)}, {"lookup": 2}):
        assert torch.equal(speculate(student, ids, max_new_tokens=16, tokens=3, **draft).ids, expected)
    with pytest.raises(TypeError, match="early_layers needs a ZooForCausalLM, got a LinearizedForCausalLM"):
        speculate(student, ids, early_layers=1)


def test_in_float32_only_ties_are_decided_otherwise(make_model, tokens):
    """Where a text first differs from the plain one, the two tokens' logits lie within the rounding."""
    for name in ("gla", "gated_deltanet", "mamba", "hybrid"):
        model, ids = make_model(name, torch.float32), tokens(2, 9)
        found = speculate(model, ids, draft=nearly(model), max_new_tokens=24).ids
        expected = model.generate(ids, max_new_tokens=24, suppress_tokens=None)
        for row in range(2):
            differ = (found[row] != expected[row]).nonzero()
            if len(differ):
                at = differ[0].item()
                logits = make_model(name)(expected[row : row + 1, :at].clone()).logits[0, -1]  # in float64
                assert (logits[found[row, at]] - logits[expected[row, at]]).abs() < 1e-4 * logits.abs().max(), name


def test_a_cache_goes_on_where_the_text_ended(make_model, tokens):
    model, ids = make_model("hybrid"), tokens(1, 9)
    expected = speculate(model, ids, lookup=2, max_new_tokens=20).ids
    for end in (None, expected[0, 15].item()):
        cache = model.init_cache(1)
        first = speculate(
            model, ids, draft=nearly(model), max_new_tokens=9, eos_token_id=end, past_key_values=cache
        ).ids
        assert cache.length == first.shape[1] - 1
        rest = 29 - first.shape[1]
        more = speculate(model, first[:, -1:], early_layers=1, max_new_tokens=rest, past_key_values=cache).ids
        assert torch.equal(torch.cat([first, more[:, 1:]], dim=1), expected)


def tiny(layers, seed, mixer="hgrn"):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 6, "hidden_size": 8, "num_hidden_layers": layers, "intermediate_size": 0}
    options = {} if mixer == "hgrn" else {"num_heads": 1, "gate_rank": 2}
    return ZooForCausalLM(ZooConfig(**sizes, mixers={mixer: options}, initializer_range=0.5)).double().eval()


@torch.no_grad()
def chi_square(model, prompt, written, sampling):
    """Texts of three tokens that were written, against their probabilities: the statistic per degree of freedom."""
    texts = torch.tensor(list(itertools.product(range(6), repeat=3)))
    p = sampling.probabilities(model(torch.cat([prompt.expand(len(texts), -1), texts], dim=1)).logits)
    p = p[:, prompt.shape[1] - 1 : -1].gather(-1, texts[..., None]).prod(dim=1)[:, 0]
    assert abs(p.sum() - 1) < 1e-9
    seen = torch.bincount(written @ torch.tensor([36, 6, 1]), minlength=216)
    assert not seen[p == 0].any()
    likely = p * len(written) >= 5  # the others are one cell
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * len(written)
    seen = torch.cat([seen[likely], seen[~likely].sum()[None]])
    return ((seen - expected) ** 2 / expected.clamp_min(1)).sum().item() / likely.sum().item()


def draw(model, sampling, **draft):
    """20,000 texts after the same prompt, and the prompt."""
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    generator = torch.Generator().manual_seed(0)
    prompts = prompt.expand(20_000, -1)
    return speculate(model, prompts, tokens=2, max_new_tokens=3, generator=generator, **options, **draft), prompt


PLAIN, CUT = Sampling(1.0), Sampling(0.7, top_k=4, top_p=0.9)
SAMPLED = {
    "draft": ({"draft": tiny(1, seed=2)}, PLAIN),
    "draft-cut": ({"draft": tiny(1, seed=2)}, CUT),
    "lookup": ({"lookup": 1}, PLAIN),
    "early_layers": ({"early_layers": 1}, PLAIN),
}


@pytest.mark.parametrize(("draft", "sampling"), SAMPLED.values(), ids=SAMPLED)
def test_sampled_texts_have_the_models_distribution(draft, sampling):
    model = tiny(3, seed=1)
    found, prompt = draw(model, sampling, **draft)
    assert found.acceptance > 0.05 or "lookup" in draft  # else the test tests little
    assert chi_square(model, prompt, found.ids[:, -3:], sampling) < 1.4  # 1 is expected, +- 0.14 with 100 cells


def test_the_chi_square_tells_models_apart():
    found, prompt = draw(tiny(1, seed=2), PLAIN, lookup=1)
    assert chi_square(tiny(3, seed=1), prompt, found.ids[:, -3:], PLAIN) > 10


@pytest.mark.slow
def test_sampled_texts_of_a_matrix_valued_state_have_the_models_distribution():
    model = tiny(2, seed=1, mixer="gla")
    found, prompt = draw(model, Sampling(1.0), draft=tiny(1, seed=2, mixer="gla"))
    assert chi_square(model, prompt, found.ids[:, -3:], Sampling(1.0)) < 1.4


def test_bad_arguments_are_named(make_model, tokens):
    model, ids = make_model("gla"), tokens(2, 5)
    other = make_model("gla", vocab_size=65)
    model.config._name_or_path, other.config._name_or_path = "runs/large", "runs/small"
    for options, message in (
        ({}, "give one of draft, lookup and early_layers, got none of them"),
        ({"lookup": 2, "early_layers": 1}, "got lookup and early_layers"),
        ({"lookup": 0}, "lookup must be a number of tokens of at least 1, got 0"),
        ({"early_layers": 3}, "early_layers must be from 1 to 2 of the model's 3 layers, got 3"),
        ({"draft": other}, "runs/small has 65 tokens, runs/large 61; train the draft with the model's tokenizer"),
        ({"lookup": 2, "tokens": 0}, "tokens must be an integer of at least 1, got 0"),
        ({"lookup": 2, "temperature": -1}, "temperature must be at least 0, got -1"),
        ({"lookup": 2, "attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}, "pad on the left"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            speculate(model, ids, **options)
    with pytest.raises(TypeError, match="model must be a model of lm_zoo"):
        speculate(new_teacher("llama"), ids, lookup=2)
    with pytest.raises(TypeError, match="draft must be a model of lm_zoo"):
        speculate(model, ids, draft=new_teacher("llama"))


def test_acceptance_of_certain_guesses():
    """Where p = q everything stays; where p gives a guess no chance it goes, and its place is taken by another."""
    logits = torch.tensor([[[0.0, 1.0, 2.0]] * 3] * 500, dtype=torch.float64)
    sampling, generator = Sampling(1.0), torch.Generator().manual_seed(0)
    p = sampling.probabilities(logits)
    guesses = torch.multinomial(p[:, 0], 2, replacement=True, generator=generator)
    assert (accept(logits, guesses, p[:, :2], sampling, generator)[0] == 2).all()
    logits[..., 0] = -torch.inf
    kept, following = accept(logits, torch.zeros(500, 2, dtype=torch.int64), None, sampling, generator)
    assert (kept == 0).all()
    assert set(following.tolist()) == {1, 2}
