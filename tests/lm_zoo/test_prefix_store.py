"""PrefixStore: the text that there is without it, prefixes read once, a budget that holds, files that outlive it."""

import pytest
import torch
from compare import assert_close
from plain_mixer import plain_mixer
from tiny_teachers import new_teacher

from lm_zoo import LinearizedForCausalLM, PrefixStore
from lm_zoo.errors import UserError

CHUNK = 4


def requests(tokens, count=5, shared=10, own=5):
    """`count` texts that have the first tokens in common."""
    return torch.cat([tokens(1, shared).expand(count, -1), tokens(count, own, seed=2)], dim=1)


def test_generates_what_a_text_without_it_gives(model, tokens):
    ids = requests(tokens)
    store = PrefixStore(model, chunk=CHUNK)
    expected = model.generate(ids, max_new_tokens=8, use_cache=False)
    for turn in range(2):  # the second finds all
        for rows in (slice(0, 1), slice(1, 3), slice(0, 5)):
            cache = store.prefill(ids[rows])
            assert cache.length == ids.shape[1] - 1
            found = model.generate(ids[rows], max_new_tokens=8, past_key_values=cache)
            assert torch.equal(found, expected[rows]), (turn, rows)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["sliding", "terrace", "plain"])
def test_linearized_models_too(mixer, tokens):
    with plain_mixer():
        base = new_teacher("qwen2").double()
        options = {} if mixer == "plain" else {"window": 3, "window_kind": mixer}
        kind = "plain" if mixer == "plain" else "hybrid"
        model = LinearizedForCausalLM.from_teacher(base, kind, options, keep_layers=[1]).eval()
        ids, store = requests(tokens), PrefixStore(model, chunk=CHUNK)
        for _ in range(2):
            cache = store.prefill(ids)
            logits = model(ids[:, -1:], past_key_values=cache).logits
            # The plain mixer of the tests computes in float32.
            assert_close(logits, model(ids).logits[:, -1:], 1e-5 if mixer == "plain" else 1e-11)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
@torch.no_grad()
def test_every_length(length, make_model, tokens):
    model = make_model("hybrid")
    ids = tokens(2, length)
    store = PrefixStore(model, chunk=CHUNK)
    for _ in range(2):
        cache = store.prefill(ids)
        assert cache.length == length - 1
        assert_close(model(ids[:, -1:], past_key_values=cache).logits, model(ids).logits[:, -1:], 1e-12)


def test_a_shared_prefix_is_read_once(make_model, tokens):
    model = make_model("gla")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    store = PrefixStore(model, chunk=CHUNK)
    ids = requests(tokens, count=6, shared=12, own=3)  # 12 tokens are shared; 2 of a text's own are read
    store.prefill(ids[:1])
    assert sum(seen) == store.tokens_read == 14
    for row in range(1, 6):
        store.prefill(ids[row : row + 1])
    assert sum(seen) == store.tokens_read == 14 + 5 * 2
    assert store.tokens_found == 5 * 12
    seen.clear()
    PrefixStore(model, chunk=CHUNK).prefill(ids)  # in one batch
    assert seen == [4, 4, 4, 12]


def test_what_is_kept_is_not_written_into(make_model, tokens):
    model = make_model("hybrid")
    ids, store = requests(tokens, count=1, shared=5, own=4), PrefixStore(model, chunk=CHUNK)
    assert ids.shape[1] - 1 == 2 * CHUNK  # a text that ends at a border gets a copy of what is kept
    first, *later = (model.generate(ids, max_new_tokens=5, past_key_values=store.prefill(ids)) for _ in range(3))
    assert all(torch.equal(first, text) for text in later)


def test_the_budget_holds_and_the_least_recently_used_goes(make_model, tokens):
    model = make_model("gla")
    size = model.init_cache(1).nbytes
    store = PrefixStore(model, budget=2 * size + size // 2, chunk=CHUNK)
    a, b, c = (tokens(1, CHUNK + 1, seed=seed) for seed in (3, 4, 5))
    for ids in (a, b, a, c):  # b is now the oldest
        store.prefill(ids)
        assert store.nbytes == len(store) * size <= store.budget
    read = store.tokens_read
    store.prefill(a)
    store.prefill(c)
    assert store.tokens_read == read
    store.prefill(b)
    assert store.tokens_read == read + CHUNK
    assert len(store) == 2
    small = PrefixStore(model, budget=size - 1, chunk=CHUNK)
    small.prefill(a)
    assert (len(small), small.nbytes) == (0, 0)
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_a_folder_outlives_the_process_and_the_budget(make_model, tokens, tmp_path):
    model = make_model("hybrid")
    ids = requests(tokens, count=3, shared=12, own=2)
    expected = model.generate(ids, max_new_tokens=5, use_cache=False)
    PrefixStore(model, chunk=CHUNK, folder=tmp_path).prefill(ids)
    for budget in ("1GiB", 0):
        store = PrefixStore(model, chunk=CHUNK, folder=tmp_path, budget=budget)
        cache = store.prefill(ids)
        assert store.tokens_read == 3  # the first of each text's own
        assert torch.equal(model.generate(ids, max_new_tokens=5, past_key_values=cache), expected)
    other = make_model("hybrid", initializer_range=0.2)
    store = PrefixStore(other, chunk=CHUNK, folder=tmp_path)
    store.prefill(ids)
    assert store.tokens_found == 2 * 12  # within the batch; nothing of the other model


@pytest.mark.parametrize(
    ("budget", "expected"), [("1GiB", 2**30), ("1.5 kB", 1500), ("500MB", 500_000_000), ("7", 7), (0, 0)]
)
def test_budgets(budget, expected, make_model):
    assert PrefixStore(make_model("gla"), budget=budget).budget == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "much"}, UserError, "budget must be a number of bytes or a string such as"),
        ({"budget": -1}, ValueError, "budget must be"),
        ({"budget": "-1GiB"}, UserError, "budget must be"),
        ({"chunk": 0}, ValueError, "chunk must be an integer of at least 1, got 0"),
    ],
)
def test_refuses_impossible_options(options, error, message, make_model):
    with pytest.raises(error, match=message):
        PrefixStore(make_model("gla"), **options)


def test_refuses_other_models_and_empty_texts(make_model):
    with pytest.raises(TypeError, match="model must be one of lm_zoo, got LlamaForCausalLM"):
        PrefixStore(new_teacher("llama"))
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with at least one token, got \[1, 0\]"):
        PrefixStore(make_model("gla")).prefill(torch.empty(1, 0, dtype=torch.int64))
