"""A recorded step is the forward pass of one token: the same logits and states, at addresses that stay."""

import pytest
import torch
from compare import assert_close

from lm_zoo import DecodeStep, ZooConfig, ZooForCausalLM, pack_weights, packing
from lm_zoo.decode import WARM_UP, CudaGraph
from lm_zoo.packing import packed
from lm_zoo.tape import Tape

STEPS = WARM_UP + 5


@pytest.fixture(autouse=True)
def products_in_parts(monkeypatch):
    """As those of large models: the models here are so small that none of theirs would be split among threads."""
    monkeypatch.setattr(packing, "FEW", 0)


def run(model, cache, ids, stepwise):
    """Logits of each token of `ids` `[B, T]`, one at a time, with a recorded step or plain forward passes."""
    step = DecodeStep(model, cache)
    with torch.no_grad():
        columns = ids.split(1, dim=1)
        if stepwise:
            return torch.cat([step(column) for column in columns], dim=1), step
        return torch.cat([model(column, past_key_values=cache).logits for column in columns], dim=1), step


def read_prompt(model, ids):
    cache = model.init_cache(ids.shape[0])
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_recorded_step_equals_the_forward_pass(model, tokens, batch, packed):
    cache = read_prompt(model, tokens(batch, 7))
    plain, ids = cache.clone(), tokens(batch, STEPS, seed=2)
    expected, _ = run(model, plain, ids, stepwise=False)
    if packed:
        pack_weights(model)
    addresses = [state[name].data_ptr() for state in cache.states for name in state]
    logits, step = run(model, cache, ids, stepwise=True)
    assert_close(logits, expected, 1e-10)
    assert cache.length == plain.length == 7 + STEPS
    for state, other in zip(cache.states, plain.states, strict=True):
        assert all(torch.allclose(state[name], other[name], rtol=1e-10, atol=1e-12) for name in state)
    kinds = [type(run) for run in step._runs]
    if "attention" not in model.config.mixers:
        assert kinds == [Tape]
        assert [state[name].data_ptr() for state in cache.states for name in state] == addresses
    else:
        assert kinds[0] is kinds[-1] is Tape


def test_a_recording_sees_new_values_of_states_and_parameters(make_model, tokens):
    model = make_model("gated_deltanet")
    cache = read_prompt(model, tokens(2, 5))
    _, step = run(model, cache, tokens(2, STEPS), stepwise=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
        cache.reorder_cache(torch.tensor([1, 0]))
        plain, ids = cache.clone(), tokens(2, 1, seed=4)
        assert_close(step(ids), model(ids, past_key_values=plain).logits, 1e-10)


def test_packed_weights_keep_values_and_are_one_copy(make_model, tmp_path):
    model = make_model("gla", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert pack_weights(model) is model
    attention = model.model.layers[0].mixer
    packed = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.gate_proj.weight]
    assert len({weight.untyped_storage().data_ptr() for weight in packed}) == 1
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(value.nbytes for value in before.values())
    pack_weights(model)  # which changes nothing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = ZooForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_packed_weights_with_the_same_input_are_one_product(make_model, tokens):
    counts = []
    for model in (make_model("gla"), pack_weights(make_model("gla"))):
        _, step = run(model, read_prompt(model, tokens(1, 5)), tokens(1, STEPS), stepwise=True)
        names = [getattr(call.func, "__name__", "") for call in step._runs[0].calls]
        counts.append(names.count("bmm"))
    # Of a layer: q, k, v, gate and the decay's first map, its second one, o, the MLP's two, and its last.
    assert counts == [3 * 10 + 1, 3 * 5 + 1]


def test_packed_weights_in_another_place_are_packed_no_more(make_model):
    model = pack_weights(make_model("gla"))
    weight = model.model.layers[0].mixer.q_proj.weight
    assert packed(weight).shape[0] > weight.shape[0]
    model.float()
    assert packed(model.model.layers[0].mixer.q_proj.weight) is None


def test_tied_weights_stay_tied(tokens):
    torch.manual_seed(0)
    config = ZooConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, mixers={"gla": {}}, tie_word_embeddings=True)
    model = ZooForCausalLM(config).double().eval()
    ids = tokens(1, 5)
    expected = model(ids).logits
    pack_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(model(ids).logits, expected, 1e-12)


def test_packed_weights_train(make_model, tokens):
    model, other = make_model("mamba2"), make_model("mamba2")
    pack_weights(model)
    for each in (model, other):
        each.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad, 1e-10)


def test_generate_records_its_steps_and_hooks_still_see_them(make_model, tokens, monkeypatch):
    model = make_model("gla")
    recorded = []
    monkeypatch.setattr("lm_zoo.decode.Tape", lambda *arguments: recorded.append(Tape(*arguments)) or recorded[-1])
    ids = tokens(2, 6)
    expected = model.generate(ids, max_new_tokens=12, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    assert len(recorded) == 1
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    assert len(seen) == 12
    hook.remove()
    assert len(recorded) == 1


def test_a_forward_pass_after_generate_is_a_plain_one(make_model, tokens):
    model = make_model("gla")
    cache, ids = model.init_cache(1), tokens(1, 6)
    model.generate(ids, max_new_tokens=12, past_key_values=cache)
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    assert seen == [1]


def test_what_cannot_be_replayed_runs_as_it_is(make_model, tokens):
    """Here a layer that asks the host for a number, which a tape would repeat as it was."""
    model = make_model("gla")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * (1 + abs(output.sum().item())))
    cache = read_prompt(model, tokens(1, 5))
    ids = tokens(1, STEPS, seed=3)
    expected, _ = run(model, cache.clone(), ids, stepwise=False)
    logits, step = run(model, cache, ids, stepwise=True)
    assert_close(logits, expected, 1e-10)
    assert not any(isinstance(run, Tape) for run in step._runs)


def test_bad_input(make_model, tokens):
    model = make_model("gla")
    cache = model.init_cache(2)
    with pytest.raises(ValueError, match=r"ids must be \[B, 1\] = \[2, 1\], got \[2, 3\]"):
        DecodeStep(model, cache)(tokens(2, 3))
    step = DecodeStep(model, cache)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="make a new DecodeStep"):
        step(tokens(2, 1))
    with pytest.raises(ValueError, match="model must be in eval mode"):
        DecodeStep(model.train(), cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 3])
def test_cuda_graphs_equal_the_forward_pass(model, tokens, batch):
    model = model.float().cuda()
    cache = read_prompt(model, tokens(batch, 7).cuda())
    plain, ids = cache.clone(), tokens(batch, STEPS, seed=2).cuda()
    expected, _ = run(model, plain, ids, stepwise=False)
    logits, step = run(model, cache, ids, stepwise=True)
    assert_close(logits, expected, 1e-4)
    assert isinstance(step._runs[0], CudaGraph)
