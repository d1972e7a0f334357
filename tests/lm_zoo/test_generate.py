"""generate() over a ZooCache: token for token what it gives without one."""

import copy

import pytest
import torch
from compare import assert_close
from transformers import DynamicCache

from lm_zoo import ZooCache

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 2.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled-beams": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
}


def generate(model, ids, new=12, seed=0, **options):
    torch.manual_seed(seed)  # transformers samples from the global generator
    return model.generate(ids, max_new_tokens=new, **options)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_cached_equals_uncached(model, tokens, options):
    ids = tokens(2, 7)
    cached = generate(model, ids, **options)
    assert cached.shape[1] == 19
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_left_padded_batch_equals_each_prompt_alone(model, tokens, options):
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :1] = 0
    for cache in (True, False):
        batch = generate(model, ids * mask, attention_mask=mask, use_cache=cache, **options)
        for row, start in enumerate((5, 1, 0)):
            alone = generate(model, ids[row : row + 1, start:], use_cache=cache, **options)
            assert torch.equal(batch[row, 8:], alone[0, 8 - start :]), (row, cache)


def test_rows_that_end_early_leave_the_others_alone(make_model, tokens):
    model = make_model("hybrid")
    ids = tokens(4, 5)
    free = generate(model, ids, new=16)
    eos = free[1, 8].item()  # one that row 1 really writes
    stopped = generate(model, ids, new=16, eos_token_id=eos)
    for row in range(4):
        written = free[row, 5:].tolist()
        end = written.index(eos) + 1 if eos in written else 16
        assert stopped[row, 5 : 5 + end].tolist() == written[:end]
        assert not stopped[row, 5 + end :].any()


def test_a_conversation_goes_on_from_its_cache(model, tokens):
    """Three turns; each passes the whole text, and only what is new is computed."""
    cache = model.init_cache(2)
    text = tokens(2, 6)
    for turn in range(3):
        seen = []
        hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].shape))
        answer = generate(model, text, new=5, past_key_values=cache)
        hook.remove()
        assert seen[0] == (2, 6 if turn == 0 else 4)  # the last token of an answer was not read yet
        assert torch.equal(answer, generate(model, text, new=5, use_cache=False))
        assert cache.get_seq_length() == answer.shape[1] - 1
        text = torch.cat([answer, tokens(2, 3, seed=turn)], dim=1)


def test_a_padded_conversation_goes_on_from_its_cache(model, tokens):
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = model.init_cache(2)
    answer = generate(model, ids, new=4, attention_mask=mask, past_key_values=cache)
    text = torch.cat([answer, tokens(2, 3, seed=9)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], dim=1)
    again = generate(model, text, new=4, attention_mask=mask, past_key_values=cache)
    alone = generate(model, text[:1, 4:], new=4)
    assert torch.equal(again[0, 4:], alone[0])
    assert torch.equal(again[1:], generate(model, text[1:], new=4))


def test_one_prefilled_prompt_forks_into_several_answers(model, tokens):
    ids = tokens(2, 8)
    cache = model.init_cache(2)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
    before = copy.deepcopy(cache)
    for options in (MODES["several"], MODES["beams"]):
        forked = generate(model, ids, past_key_values=cache, **options)
        assert torch.equal(forked, generate(model, ids, use_cache=False, **options))
    for state, old in zip(cache.states, before.states, strict=True):  # the copies grew, not the original
        assert all(torch.equal(state[name], old[name]) for name in state)
    assert cache.get_seq_length() == 7


def test_prompts_in_pieces_and_as_embeddings(model, tokens):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=4), expected)
    embeds = model.get_input_embeddings()(ids)
    written = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(written, expected[:, 9:])


def test_a_decoding_step_does_not_look_at_the_mask(make_model, tokens):
    model = make_model("gla")
    ids = tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    masks = []
    hook = model.register_forward_pre_hook(
        lambda _, __, arguments: masks.append(arguments.get("attention_mask")), with_kwargs=True
    )
    generate(model, ids, new=4, attention_mask=mask)
    hook.remove()
    assert torch.equal(masks[0], mask)
    assert masks[1:] == [None] * 3


def test_cache_selects_forks_clones_and_resets(model, tokens):
    ids, more = tokens(3, 6), tokens(3, 2, seed=2)
    cache = model.init_cache(3)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(torch.cat([ids, more], dim=1)).logits[:, 6:]
        for other, rows in [
            (cache.clone(), [0, 1, 2]),
            (cache.select(torch.tensor([2, 0])), [2, 0]),
            (cache.fork(2), [0, 0, 1, 1, 2, 2]),
        ]:
            assert other.get_seq_length() == 6
            assert other.batch_size == len(rows)
            assert_close(model(more[rows], past_key_values=other).logits, expected[rows], 1e-10)
        assert_close(model(more, past_key_values=cache).logits, expected, 1e-10)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        rows = torch.cat([ids, more, more], dim=1)[[1, 1, 0]]
        rows[:, -2:] = more
        assert_close(model(more, past_key_values=cache).logits, model(rows).logits[:, -2:], 1e-10)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, 1e-10)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.batch_size == 2
    assert len(cache) == 3
    assert repr(cache) == "ZooCache(3 layers, batch size 2, length 6)"


def test_bytes_of_state(make_model, tokens):
    model = make_model("gla", torch.float32)
    cache = model.init_cache(2)
    assert cache.nbytes == 3 * 2 * 4 * (4 * 8) * 4  # layers, rows, heads, K x V, float32
    with torch.no_grad():
        model(tokens(2, 50), past_key_values=cache)
    assert cache.nbytes == 3 * 2 * 4 * (4 * 8) * 4
    cache = make_model("attention", torch.float32).init_cache(1)
    before = cache.nbytes
    with torch.no_grad():
        make_model("attention", torch.float32)(tokens(1, 64), past_key_values=cache)
    assert cache.nbytes - before == 3 * 2 * 64 * 32 * 4  # layers, keys and values, tokens, D, float32


def test_what_cannot_work_is_refused(make_model, tokens):
    model = make_model("gla")
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(TypeError, match="past_key_values must be a ZooCache"):
        model.generate(ids, max_new_tokens=3, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values has 3 rows, but the input has 1"):
        model.generate(ids, max_new_tokens=3, past_key_values=model.init_cache(3))
    with pytest.raises(ValueError, match="cannot go back"):
        model.init_cache(1).crop(-1)
    with pytest.raises(TypeError, match="takes no keys and values"):
        model.init_cache(1).update(ids, ids, 0)
    assert not ZooCache([]).is_croppable
