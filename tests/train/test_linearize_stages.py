"""Transfer, recovery and controls against their definitions."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from linearize_fixtures import byte_teacher, load_data, small_spec, small_student
from tiny_teachers import TEACHERS

from lm_zoo.linearized import softmax
from lm_zoo.train.linearize import Recover, Transfer, controls, recover, transfer
from lm_zoo.train.linearize.recover import Recovery, divergence, projections
from lm_zoo.train.linearize.weights import mixer_weights, weights_cross_entropy

OPTIONS = {
    "sliding": {"window": 4, "window_kind": "sliding"},
    "terrace": {"window": 4, "window_kind": "terrace", "beta": "complement"},
    "none": {"window": 0},
    "kv_head": {"window": 0, "feature_map_per": "kv_head"},
}


@pytest.fixture
def batch(tmp_path):
    return load_data(tmp_path).rows("training", 32).batch([0, 1])


def randomised(student):
    """Mixers away from where they start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in transfer.mixer_parameters(student).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return student


def attention_inputs(student, batch) -> dict:
    """q, k, v and context of each layer on the way of the teacher."""
    seen = {}

    def note(module, q, k, v, context):
        seen[module.layer_idx] = (module, q, k, v, copy.copy(context))
        return softmax(module, q, k, v, context)

    with torch.no_grad(), student.observed(note):
        student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    return seen


@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_the_loss_of_a_layer_and_its_gradients(batch, loss) -> None:
    """As each layer on its own would have them, given the teacher's inputs of that layer."""
    student = randomised(small_student(keep=[1]))
    options = Transfer(tokens=1, learning_rate=1, loss=loss)
    losses = transfer.layer_losses(student, batch, options, gradient_factor=0.5)
    assert losses.keys() == {0, 2}
    gradients = {name: value.grad.clone() for name, value in transfer.mixer_parameters(student).items()}
    student.zero_grad()
    for layer, (module, q, k, v, context) in attention_inputs(student, batch).items():
        if module.mixer is None:
            continue
        y = softmax(module, q, k, v, context)
        z = module.mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)
        error = (z - y).square()
        expected = error.sum() / y.square().sum() if loss == "normalized_mse" else 1000 * error.mean()
        (0.5 * expected).backward()
        assert losses[layer].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in transfer.mixer_parameters(student).items():
        assert value.grad.abs().max() > 0, name
        assert_close(gradients[name], value.grad, 1e-5)


def test_the_teachers_outputs_go_on(batch) -> None:
    student = randomised(small_student())
    with student.observed(transfer.LayerLosses(Transfer(tokens=1, learning_rate=1))):
        through = student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        expected = student.as_teacher().base_model(batch.input_ids[:, start:end]).last_hidden_state
        assert_close(through[:, start:end], expected, 1e-5)


def test_one_layers_activations_are_alive_at_a_time(batch) -> None:
    student = small_student()
    alive, most = set(), [0]

    def pack(tensor):
        token = object()
        alive.add(token)
        most[0] = max(most[0], len(alive))
        return token, tensor.detach()

    def unpack(packed):
        alive.discard(packed[0])
        return packed[1]

    def most_alive(layers):
        most[0] = 0
        options = Transfer(tokens=1, learning_rate=1)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            transfer.layer_losses(layers, batch, options, gradient_factor=1.0)
        alive.clear()
        return most[0]

    assert most_alive(small_student(keep=[1, 2])) == pytest.approx(most_alive(student), rel=0.2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_weights_written_out_make_the_mixers_output(options) -> None:
    student = randomised(small_student(options))
    mixer = student.attention_layers[0].mixer
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 19, heads, 6, generator=generator) for heads in (4, 2, 2))
    token = torch.arange(19)
    k_wide, v_wide = (x[0].repeat_interleave(2, dim=1) for x in (k, v))
    scores = mixer.scale * torch.einsum("nhd,jhd->hnj", q[0], k_wide)
    weights = mixer_weights(mixer, scores, q[0], k[0], token[:, None] - token)
    expected = mixer(q, k, v, context=None, state=None, cu_seqlens=None)[0]
    assert_close(torch.einsum("hnj,jhd->nhd", weights, v_wide), expected, 1e-5)
    assert_close(weights.sum(dim=-1), torch.ones(4, 19), 1e-5)


def test_cross_entropy_is_the_entropy_where_weights_agree(batch) -> None:
    """With a window as long as the text; and it is larger for weights that differ."""
    alike, different = small_student({"window": 64, "window_kind": "sliding"}), small_student({"window": 0})
    inputs = attention_inputs(alike, batch)
    for layer, (module, q, k, _, context) in inputs.items():
        total = 0.0
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            keys = k[0, start:end].repeat_interleave(2, dim=1)
            scores = module.scaling * torch.einsum("nhd,jhd->hnj", q[0, start:end], keys)
            causal = torch.ones(end - start, end - start).tril().bool()
            weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
            total -= torch.special.xlogy(weights, weights).sum().item()
        entropy = total / q.shape[1] / 4
        assert weights_cross_entropy(module, q, k, context).item() == pytest.approx(entropy, rel=1e-4)
        other = weights_cross_entropy(different.attention_layers[layer], q, k, context).item()
        assert other > entropy + 1e-3


@pytest.mark.parametrize("chunk", [2**22, 300])
def test_divergence_and_its_gradient(monkeypatch, chunk) -> None:
    """Whether the tokens are one chunk or many."""
    monkeypatch.setattr(recover, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, expected = (torch.randn(23, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    results = []
    for kind in ("ours", "plain"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if kind == "ours":
            loss = divergence(h, expected, lambda x, w=w: x @ w.T, lambda x: x @ weight.T)
        else:
            p, log_q = (expected @ weight.T).softmax(-1), (h @ w.T).log_softmax(-1)
            loss = (p * (p.log() - log_q)).sum(-1).mean()
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for actual, reference in zip(*results, strict=True):
        assert_close(actual, reference, 1e-4)


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_the_teacher_in_recovery_stays_itself(batch, parameters) -> None:
    """With a window longer than the text the student starts as the teacher, and goes away from it."""
    student = small_student({"window": 64, "window_kind": "sliding"})
    options = Recover(tokens=1, learning_rate=1, parameters=parameters, next_token=0, kl=1)
    recovery = Recovery(student, options, seed=0)
    assert recovery.loss(batch).item() == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in recovery.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    moved = recovery.loss(batch).item()
    assert moved > 1e-3
    index, _ = batch.next_tokens()
    log_p = _log_probabilities(byte_teacher(), batch)[index]
    log_q = student.head(student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0, index]).log_softmax(-1)
    assert moved == pytest.approx(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(), rel=1e-4)


@pytest.mark.parametrize(("step", "waiting"), [(1, [1]), (2, [])])
def test_layers_are_replaced_step_by_step(batch, step, waiting) -> None:
    """Of three the first and the last in the first of two steps; the others keep the softmax that trains with them."""
    student, expected = small_student(), small_student(keep=waiting)
    recovery = Recovery(student, Recover(tokens=1, learning_rate=1, parameters="all", replacement_steps=2), seed=0)
    assert recovery.loss(batch).item() == pytest.approx(_next_token_loss(small_student(), batch), rel=1e-5)
    recovery.replace(step)
    recovery.backward(batch, 1.0)
    assert recovery.loss(batch).item() == pytest.approx(_next_token_loss(expected, batch), rel=1e-5)
    assert recovery.held_out_loss(_OneBatch(batch), 1) == pytest.approx(_next_token_loss(expected, batch), rel=1e-5)
    for layer, module in enumerate(student.attention_layers):
        learns = [parameter.grad is not None for parameter in module.mixer.parameters()]
        assert learns == [layer not in waiting] * len(learns)
        assert module.q_proj.weight.grad.abs().max() > 0


class _OneBatch:
    def __init__(self, batch) -> None:
        self.batch = batch

    def batches(self, rows, tokens):
        return [self.batch]


def _next_token_loss(student, batch) -> float:
    return student(batch.input_ids, labels=batch.input_ids, cu_seqlens=batch.cu_seqlens).loss.item()


def _log_probabilities(teacher, batch):
    borders = itertools.pairwise(batch.cu_seqlens.tolist())
    with torch.no_grad():
        return torch.cat([teacher(batch.input_ids[:, a:b]).logits[0].log_softmax(-1) for a, b in borders])


def test_next_token_loss_is_the_models_own(batch) -> None:
    student = small_student()
    loss = Recovery(student, Recover(tokens=1, learning_rate=1), seed=0).loss(batch)
    expected = student(batch.input_ids, labels=batch.input_ids, cu_seqlens=batch.cu_seqlens).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, ("lora_A", "lora_B")),
        ({"train_mixers": True}, ("lora_A", "lora_B", ".mixer.")),
        ({"parameters": "all"}, ("self_attn", "mlp", "norm", "embed", "lm_head", ".mixer.")),
    ],
)
def test_what_is_trained(batch, options, trained) -> None:
    recovery = Recovery(small_student(), Recover(tokens=1, learning_rate=1, kl=1, **options), seed=0)
    names = list(recovery.parameters)
    assert all(any(kind in name for kind in trained) for name in names)
    assert all(any(kind in name for name in names) for kind in trained)
    recovery.backward(batch, 1.0)
    assert all(parameter.grad is not None for parameter in recovery.parameters.values())


def test_merged_adapters_give_the_same_model(batch) -> None:
    student = small_student()
    names = list(student.state_dict())
    recovery = Recovery(student, Recover(tokens=1, learning_rate=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in recovery.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    before = student(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
    recovery.finish()
    assert list(student.state_dict()) == names
    assert_close(student(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits, before, 1e-5)


@pytest.mark.parametrize("family", TEACHERS)
def test_projections_of_every_family(family) -> None:
    """All of q, k, v and o are found in every layer, whatever the family calls them, and nothing else."""
    student = small_student(family=family)
    fused = {"gpt2": 1, "gpt_neox": 1, "phi3": 1}.get(family, 3)
    layers = len(student.attention_layers)
    assert len(projections(student, ("q", "k", "v"))) == fused * layers
    assert len(projections(student, ("q", "k", "v", "o"))) == (fused + 1) * layers
    assert len(projections(student, ("o",))) == layers
    Recovery(student, Recover(tokens=1, learning_rate=1), seed=0).finish()


@pytest.mark.parametrize("kind", ["sliding", "terrace"])
@pytest.mark.parametrize("family", ["llama", "mistral", "granite"])  # granite has a scale of its own
def test_window_only_is_the_mixer_without_its_linear_part(batch, family, kind) -> None:
    """Also where the teacher's own window is the shorter one, which the student does not know of."""
    student = small_student({"window": 4, "window_kind": kind}, family=family)
    for module, q, k, v, context in attention_inputs(student, batch).values():
        mixer = module.mixer
        with torch.no_grad():  # no key is written
            mixer._written = lambda k, v, mixer=mixer: (0 * mixer.k_map(wide(mixer, k)), with_ones(wide(mixer, v)))
            expected = mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)
            actual = controls.window_only(module, q, k, v, context)
        if family != "mistral" or kind == "sliding":
            assert_close(actual, expected, 1e-5)
        else:
            assert not torch.allclose(actual, expected, atol=1e-3)


def wide(mixer, x):
    return x.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=2)


def with_ones(v):
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def test_perplexities(tmp_path) -> None:
    student, rows = randomised(small_student()), load_data(tmp_path).rows("measuring", 32)
    values = {}
    for name, model in (("student", student), ("teacher", student.as_teacher())):
        nats = tokens = 0
        for i in range(len(rows.texts)):
            ids = torch.from_numpy(rows.texts[i])[None]
            nats += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
        values[name] = torch.tensor(nats / tokens).exp().item()
    assert controls.perplexity(student, rows, 10**9) == pytest.approx(values["student"], rel=1e-4)
    assert controls.perplexity(student, rows, 10**9, softmax) == pytest.approx(values["teacher"], rel=1e-4)


def test_without_a_window_nothing_is_left_of_attention(tmp_path) -> None:
    """As if the teacher's output projections were zero in the layers that are replaced."""
    student, rows = randomised(small_student({"window": 0}, keep=[1])), load_data(tmp_path).rows("measuring", 32)
    ablated = controls.perplexity(student, rows, 10**9, controls.window_only)
    with torch.no_grad():
        for layer in (0, 2):
            student.attention_layers[layer].o_proj.weight.zero_()
    assert ablated == pytest.approx(controls.perplexity(student, rows, 10**9, softmax), rel=1e-6)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_norms_are_matched_per_head(batch, mixer) -> None:
    student = small_student({}, mixer=mixer, keep=[1])
    transfer.match_norms(student, batch)
    for layer, (module, q, k, v, context) in attention_inputs(student, batch).items():
        if layer == 1:
            continue
        expected = softmax(module, q, k, v, context)
        with torch.no_grad():
            output = module.mixer(q, k, v, context=context, state=None, cu_seqlens=context.cu_seqlens)
        assert_close(output.square().sum(dim=(0, 1, 3)), expected.square().sum(dim=(0, 1, 3)), 1e-4)


def test_the_gap() -> None:
    assert controls.gap_closed(8.0, 4.0, 5.0) == 0.75
    assert controls.gap_closed(8.0, 4.0, 9.0) == -0.25
    assert controls.gap_closed(None, 4.0, 5.0) is None
    assert controls.gap_closed(4.0, 4.0, 5.0) is None


def test_bytes_of_the_state() -> None:
    """Two of three layers: rings of 4 keys and values of 2 heads of 6, and S of 4 heads of 12 features by 7."""
    sizes = controls.state_size(small_student(keep=[1]))
    ring, S, position = 2 * 4 * 2 * 6 * 4, 4 * 12 * 7 * 4, 8
    assert sizes["bytes"] == 2 * (ring + S + position)
    assert sizes["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 6 * 4)
    least = sizes["smaller_than_the_kv_cache_from"]
    assert (least - 1) * 192 <= sizes["bytes"] < least * 192


@pytest.mark.parametrize(
    ("mixer", "changes", "message"),
    [
        ("liger", {}, "'liger' has no parameters"),
        ("hybrid", {"match_norms": True}, "match_norms: the mixer 'hybrid' has no scale"),
        ("gla", {"transfer.weights_cross_entropy": 1.0}, "the mixer 'gla' has no attention weights"),
    ],
)
def test_what_a_mixer_cannot_do_is_named(mixer, changes, message) -> None:
    transfer.check_mixers(small_student(), small_spec().override({"transfer.weights_cross_entropy": 1.0}))
    spec = small_spec().override({"mixer": mixer, **changes})
    with pytest.raises(ValueError, match=message):
        transfer.check_mixers(small_student({}, mixer=mixer), spec)
    transfer.check_mixers(small_student({}, mixer=mixer), spec.override({"transfer": None, "match_norms": False}))
    transfer.check_mixers(small_student({}, mixer=mixer, keep=[0, 1, 2]), spec.override({"transfer": None}))
