"""A long prompt is read in pieces: the same logits and states as in one, and no more memory than a piece takes."""

import pytest
import torch
from compare import assert_close

PIECE = 8


@pytest.fixture
def lengths(monkeypatch):
    """Pieces of 8 tokens; the lengths of what the model reads are noted."""
    monkeypatch.setattr("lm_zoo.causal_lm.PREFILL_CHUNK", PIECE)
    seen = []

    def watch(model):
        model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        return seen

    return watch


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 9, 16, 17, 30])
def test_pieces_give_what_one_call_gives(length, make_model, tokens, lengths):
    model = make_model("hybrid")
    ids, cache = tokens(2, length), model.init_cache(2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, mask).logits[:, -1:]
    seen = lengths(model)
    logits = model(ids, mask, past_key_values=cache, logits_to_keep=1).logits
    assert_close(logits, expected, 1e-12)
    assert max(seen) == PIECE
    assert sum(seen) == length
    assert cache.length == length
    more = tokens(2, 11, seed=2)
    whole = model(torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)).logits[:, -3:]
    assert_close(model(more, past_key_values=cache, logits_to_keep=3).logits, whole, 1e-12)


def test_generate_reads_in_pieces(make_model, tokens, lengths):
    model = make_model("hybrid")
    ids = tokens(2, 30)
    expected = model.generate(ids, max_new_tokens=5, use_cache=False)
    seen = lengths(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5), expected)
    assert seen == [8, 8, 8, 6, 1, 1, 1, 1]


def test_what_asks_for_more_is_read_at_once(make_model, tokens, lengths):
    model = make_model("gla")
    ids, seen = tokens(1, 30), lengths(model)
    model(ids, past_key_values=model.init_cache(1), logits_to_keep=1)  # gradients flow through all of it
    with torch.no_grad():
        assert model(ids, past_key_values=model.init_cache(1)).logits.shape[1] == 30
        model(ids, logits_to_keep=1)
    assert seen == [30, 30, 30]
