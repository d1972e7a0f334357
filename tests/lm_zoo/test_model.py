"""ZooForCausalLM's forward pass in every mode: padded, packed, split, checkpointed, with labels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo import MIXERS, ZooCache, ZooForCausalLM
from lm_zoo.causal_lm import next_labels

# Rows of 9 columns with padding on the left, on the right, in the middle, everywhere, and nowhere.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)


def alone(model, ids, mask):
    """Each row's tokens without its padding: logits at the tokens, in order."""
    return [model(row[m.bool()][None]).logits[0] for row, m in zip(ids, mask, strict=True) if m.any()]


def test_padding_anywhere_touches_nothing(model, tokens):
    ids = tokens(5, 9)
    for other in (ids, ids.masked_fill(MASK == 0, 7)):  # what stands at the padding does not matter
        logits = model(other, attention_mask=MASK).logits
        for row, expected in zip([0, 1, 2, 4], alone(model, ids, MASK), strict=True):
            assert_close(logits[row][MASK[row].bool()], expected, 1e-10)
    assert not model.model(ids, attention_mask=MASK)[MASK == 0].any()


def test_padding_is_not_fed_into_the_cache(model, tokens):
    """Two masked calls and a dense one over a cache, each row as if it had been alone; a row may get nothing."""
    ids, more, last = tokens(5, 9), tokens(5, 4, seed=2), tokens(5, 1, seed=3)
    second = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0]])
    cache = model.init_cache(5)
    with torch.no_grad():
        model(ids, attention_mask=MASK, past_key_values=cache)
        # the mask may be that of the new columns, or of all
        wide = model(more, attention_mask=torch.cat([MASK, second], dim=1), past_key_values=cache.clone()).logits
        narrow = model(more, attention_mask=second, past_key_values=cache).logits
        assert torch.equal(wide, narrow)
        assert cache.get_seq_length() == 13
        logits = model(last, past_key_values=cache).logits
        every, mask = torch.cat([ids, more, last], dim=1), torch.cat([MASK, second, torch.ones(5, 1)], dim=1)
        for row, expected in enumerate(alone(model, every, mask)):
            assert_close(logits[row, 0], expected[-1], 1e-10)


def test_nothing_but_padding_leaves_a_cache_as_it_was(model, tokens):
    ids, none = tokens(2, 4), torch.zeros(2, 4, dtype=torch.long)
    cache = model.init_cache(2)
    model(ids, past_key_values=cache)
    before = cache.clone()
    output = model(ids, attention_mask=none, labels=ids, past_key_values=cache)
    assert output.loss == 0
    assert cache.get_seq_length() == 8
    for state, old in zip(cache.states, before.states, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in state)


def test_packed_documents_equal_each_alone(model, tokens):
    ids = tokens(1, 20)
    bounds = [0, 7, 7, 8, 20]
    logits = model(ids, cu_seqlens=torch.tensor(bounds)).logits
    parts = [model(ids[:, a:b]).logits for a, b in itertools.pairwise(bounds) if a < b]
    assert_close(logits, torch.cat(parts, dim=1), 1e-10)


def test_packed_documents_continue_the_rows_of_a_cache(model, tokens):
    ids, more = tokens(3, 6), tokens(3, 5, seed=2)
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, ZooCache)
    packed = torch.cat([more[0, :5], more[2, :2]])[None]
    logits = model(packed, past_key_values=cache, cu_seqlens=torch.tensor([0, 5, 5, 7])).logits
    assert_close(logits[:, :5], model(torch.cat([ids[:1], more[:1]], dim=1)).logits[:, 6:], 1e-10)
    assert_close(logits[:, 5:], model(torch.cat([ids[2:], more[2:, :2]], dim=1)).logits[:, 6:], 1e-10)


def test_any_split_equals_one_call(model, tokens):
    ids = tokens(2, 12)
    whole = model(ids).logits
    for sizes in ([1] * 12, [5, 1, 6]):
        cache = model.init_cache(2)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole, 1e-10)
        assert cache.get_seq_length() == 12


def test_gradients_flow_through_the_cache(model, tokens):
    ids = tokens(2, 8)
    expected = torch.autograd.grad(model(ids).logits[:, 5:].square().sum(), model.parameters())
    cache = model.init_cache(2)
    model(ids[:, :5], past_key_values=cache)
    logits = model(ids[:, 5:], past_key_values=cache).logits
    for a, b in zip(torch.autograd.grad(logits.square().sum(), model.parameters()), expected, strict=True):
        assert_close(a, b, 1e-9)


def test_loss_is_the_mean_over_counted_tokens(model, tokens):
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.logits is None
    assert_close(output.loss, expected, 1e-12)
    for a, b in zip(
        torch.autograd.grad(output.loss, model.parameters()),
        torch.autograd.grad(expected, model.parameters()),
        strict=True,
    ):
        assert_close(a, b, 1e-10)


def test_loss_of_packed_documents_stops_at_their_borders(model, tokens):
    ids = tokens(1, 20)
    bounds = [0, 0, 7, 8, 8, 20, 20]
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor(bounds)).loss
    parts = [ids[:, a:b] for a, b in itertools.pairwise(bounds) if b - a > 1]
    total = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts)
    assert_close(packed, total / sum(part.shape[1] - 1 for part in parts), 1e-12)


def test_loss_of_padded_rows_is_that_of_their_tokens(model, tokens):
    ids = tokens(5, 9)
    padded = model(ids, attention_mask=MASK, labels=ids).loss  # the labels at the padding need not be -100
    texts = [row[m.bool()][None] for row, m in zip(ids, MASK, strict=True) if m.any()]
    total = sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts)
    assert_close(padded, total / sum(text.shape[1] - 1 for text in texts), 1e-12)
    cache = model(ids, use_cache=True).past_key_values
    wide = torch.cat([torch.ones_like(MASK), MASK], dim=1)
    assert torch.equal(
        model(ids, attention_mask=wide, labels=ids, past_key_values=cache.clone()).loss,
        model(ids, attention_mask=MASK, labels=ids, past_key_values=cache).loss,
    )


def test_next_labels():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    none = -100
    assert next_labels(labels, labels.shape).tolist() == [[2, 3, 4, 5, 6, none]]
    packed = next_labels(labels, labels.shape, cu_seqlens=torch.tensor([0, 0, 2, 2, 5, 6, 6], dtype=torch.int32))
    assert packed.tolist() == [[2, none, 4, 5, none, none]]
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    assert next_labels(labels, labels.shape, mask).tolist() == [[none, 4, none, 5, none, none]]


def test_gradient_checkpointing_gives_the_same_gradients(model, tokens):
    ids = tokens(1, 12)
    cu_seqlens = torch.tensor([0, 5, 12])
    model.train()
    expected = torch.autograd.grad(model(ids, labels=ids, cu_seqlens=cu_seqlens).loss, model.parameters())
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    grads = torch.autograd.grad(model(ids, labels=ids, cu_seqlens=cu_seqlens).loss, model.parameters())
    assert len(calls) == 2  # forward, and again in the backward pass
    for a, b in zip(grads, expected, strict=True):
        assert_close(a, b, 1e-10)
    with pytest.raises(ValueError, match="gradient checkpointing runs each block twice"):
        model(ids, use_cache=True)
    with torch.no_grad():
        model(ids, use_cache=True)


# torch.compile itself makes an instance of autograd functions that it meets
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_training_step_compiles_whole(model, tokens):
    ids = tokens(1, 12)
    cu_seqlens = torch.tensor([0, 5, 12])
    expected = torch.autograd.grad(model(ids, labels=ids, cu_seqlens=cu_seqlens).loss, model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    grads = torch.autograd.grad(compiled(ids, labels=ids, cu_seqlens=cu_seqlens).loss, model.parameters())
    for a, b in zip(grads, expected, strict=True):
        assert_close(a, b, 1e-10)


def test_the_pattern_is_repeated_over_the_depth(make_model):
    model = make_model("hybrid", num_hidden_layers=5)
    kinds = [type(layer.mixer) for layer in model.model.layers]
    gla, attention = MIXERS["gla"], MIXERS["attention"]
    assert kinds == [gla, attention, attention, gla, attention]
    assert [getattr(layer.mixer, "window", None) for layer in model.model.layers] == [None, 5, None, None, 5]


def test_tied_embeddings_are_one_parameter(make_model, tokens):
    model = make_model("gla", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loose = make_model("gla")
    assert loose.num_parameters() - model.num_parameters() == model.lm_head.weight.numel()
    ids = tokens(2, 7)
    loss = model(ids, labels=ids).loss
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    weight = model.lm_head.weight
    assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0], 1e-10)


def test_only_the_logits_that_are_asked_for(model, tokens):
    ids = tokens(2, 7)
    whole = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], 1e-12)
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]], 1e-12)


def test_embeddings_in_place_of_ids(model, tokens):
    ids = tokens(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    loss, cache = model(ids, labels=ids, use_cache=True, return_dict=False)
    assert loss.dim() == 0
    assert cache.get_seq_length() == 7


def test_bfloat16(make_model, tokens):
    ids = tokens(2, 20)
    for name in (*MIXERS, "hybrid"):
        model = make_model(name, torch.bfloat16, initializer_range=0.1)
        exact = make_model(name, initializer_range=0.1)
        exact.load_state_dict(model.state_dict())
        expected = exact(ids).logits
        assert model(ids).logits.dtype == torch.bfloat16
        assert_close(model(ids).logits, expected, 5e-2, name)
        cache = model.init_cache(2)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split([10, *[1] * 10], dim=1)]
        assert_close(torch.cat(parts, dim=1), expected, 5e-2, name)
        model(ids, labels=ids).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast(make_model, tokens):
    ids = tokens(2, 20)
    model = make_model("hybrid", torch.float32, initializer_range=0.1)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
        cache = model.init_cache(2)
        with torch.no_grad():
            for part in ids.split([10, *[1] * 10], dim=1):
                model(part, past_key_values=cache)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-2)
    assert cache.states[1]["keys"].dtype == torch.bfloat16
    assert cache.states[0]["S"].dtype == torch.float32


def test_initial_weights_on_the_meta_device(make_model):
    """A model that is built without memory and filled later starts as any other."""
    config = make_model("hybrid").config
    with torch.device("meta"):
        model = ZooForCausalLM(config)
    model.to_empty(device="cpu")
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() / config.initializer_range - 1) < 0.3, name


def test_bad_input_names_the_argument(make_model, tokens):
    model = make_model("hybrid")
    ids = tokens(2, 4)
    cache = model.init_cache(2)
    other = make_model("hybrid", num_hidden_layers=2)
    for arguments, error, message in [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"use_cache": True}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids[:1], "cu_seqlens": [0, 4], "use_cache": True}, TypeError, "cu_seqlens must be a tensor"),
        ({"input_ids": ids[0]}, ValueError, r"input_ids must be \[B, T\] with at least one token, got \[4\]"),
        ({"input_ids": ids[:, :0]}, ValueError, "at least one token"),
        ({"inputs_embeds": ids}, ValueError, r"inputs_embeds must be \[B, T, D\]"),
        ({"input_ids": ids + 61}, ValueError, r"input_ids must be in \[0, vocab_size = 61\), got ids from"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, ValueError, r"labels must be \[B, T\] = \[2, 4\], got \[2, 3\]"),
        ({"input_ids": ids, "attention_mask": ids[:, 1:]}, ValueError, r"attention_mask must be \[B, T\] = \[2, 4\]"),
        ({"input_ids": ids, "cu_seqlens": torch.tensor([0, 4])}, ValueError, "B must be 1"),
        (
            {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 4]), "attention_mask": ids[:1] > 0},
            ValueError,
            "attention_mask or cu_seqlens, not both",
        ),
        ({"input_ids": ids[:1], "past_key_values": cache}, ValueError, "past_key_values has 2 rows, but the input has"),
        ({"input_ids": ids, "past_key_values": other.init_cache(2)}, ValueError, "has 2 layers, but the model has 3"),
        ({"input_ids": ids, "past_key_values": [1]}, TypeError, "past_key_values must be a ZooCache .* got list"),
    ]:
        with pytest.raises(error, match=message):
            model(**arguments)


def test_without_an_mlp_a_block_is_its_mixer_alone(make_model, tokens):
    model = make_model("gla", intermediate_size=0)
    assert not any("mlp" in name for name in model.state_dict())
    x = model.model.embed_tokens(tokens(2, 9))
    for layer in model.model.layers:
        x = x + layer.mixer(layer.mixer_norm(x))
    assert_close(model(tokens(2, 9)).logits, model.lm_head(model.model.norm(x)), 1e-12)
