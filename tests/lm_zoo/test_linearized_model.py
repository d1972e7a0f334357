"""LinearizedForCausalLM in every mode, on every family: with all softmax kept it is the teacher, and with inner mixers
any way of cutting a text, padding a batch or packing it gives the same."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from peft import LoraConfig, get_peft_model
from plain_mixer import plain_mixer
from tiny_teachers import LAYERS, TEACHERS, VOCAB, WINDOW, new_teacher, teacher

from lm_zoo import LinearizedForCausalLM
from lm_zoo.linearized import FAMILIES, INNER_MIXERS, softmax

LENGTHS = (12, 7, 1)  # more than two windows, one and a bit, one token
SPLITS = ((1,) * 12, (5, 7), (3, 1, 8), (11, 1))
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True, scope="module")
def _plain_mixer():
    with plain_mixer():
        yield


@pytest.fixture(params=TEACHERS)
def name(request):
    return request.param


def kept(name):
    return LinearizedForCausalLM.from_teacher(teacher(name), "plain", keep_layers=range(LAYERS))


def student(name, **changes):
    """Layers 0 and 2 replaced; layer 1, a local one where the family has any, keeps its softmax."""
    base = new_teacher(name, **changes)
    torch.manual_seed(2)
    return LinearizedForCausalLM.from_teacher(base, "plain", {"decay": -0.2}, keep_layers=[1])


def texts(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (1, length), generator=generator) for length in LENGTHS]


def left_padded(rows):
    """The rows as a batch, and its mask."""
    longest = max(row.shape[1] for row in rows)
    masks = [F.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return torch.cat([F.pad(row, (longest - row.shape[1], 0)) for row in rows]), torch.cat(masks)


def packed(rows):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(row.shape[1] for row in rows)])
    return torch.cat(rows, dim=1), cu_seqlens


def every_way(model, rows):
    """The logits of all tokens of all rows end to end, `[tokens, V]`, by every way of calling the model."""
    batch, mask = left_padded(rows)
    ids, cu_seqlens = packed(rows)
    yield "padded", model(batch, mask).logits[mask.bool()]
    yield "packed", model(ids, cu_seqlens=cu_seqlens).logits[0]
    for split in SPLITS:
        cache, pieces, start = model.init_cache(len(rows)), [], 0
        for length in split:
            piece = slice(start, start + length)
            pieces.append(model(batch[:, piece], mask[:, piece], past_key_values=cache).logits)
            start += length
        yield f"padded, split {split}", torch.cat(pieces, dim=1)[mask.bool()]
    cache, halves = model.init_cache(len(rows)), []
    for half in (slice(0, 4), slice(4, None)):  # the last row, of one token, is empty in the second half
        ids, cu_seqlens = packed([row[:, half] for row in rows])
        halves.append(model(ids, cu_seqlens=cu_seqlens, past_key_values=cache).logits[0])
    pieces = [half.split([len(row[0, cut]) for row in rows]) for half, cut in
              zip(halves, (slice(0, 4), slice(4, None)), strict=True)]  # fmt: skip
    yield "packed, split", torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair])


def test_all_families_are_here():
    assert {kind for kind, _ in TEACHERS.values()} == set(FAMILIES)
    assert len(FAMILIES) == 14


@torch.no_grad()
def test_all_layers_kept_is_the_teacher(name):
    rows = texts()
    expected = torch.cat([teacher(name)(row).logits[0] for row in rows])
    model = kept(name)
    for way, logits in every_way(model, rows):
        assert_close(logits, expected, 1e-5, way)
    assert_close(torch.cat([model.as_teacher()(row).logits[0] for row in rows]), expected, 1e-7, "as_teacher")


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_all_layers_kept_writes_as_the_teacher(name, options):
    ids, mask = left_padded(texts())
    written = []
    for model in (teacher(name), kept(name)):
        torch.manual_seed(4)  # transformers samples from the global generator
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, **options))
    assert torch.equal(*written)
    assert written[0].shape[1] == 18


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_rotary_angles_do_not_hang_on_the_length_of_the_text(name, tmp_path):
    """Where the teacher's do: for texts of more than 8 tokens."""
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    if name == "phi3":
        rope |= {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        lengths = {"max_position_embeddings": 32, "original_max_position_embeddings": 8}
    else:
        lengths = {"max_position_embeddings": 8}
    base = new_teacher(name, rope_parameters=rope, **lengths)
    rows = texts()
    long, short = base(rows[0]).logits, base(rows[1]).logits
    base(rows[0])  # leaves the angles of a long text behind
    model = LinearizedForCausalLM.from_teacher(base, "plain", keep_layers=range(LAYERS))
    expected = torch.cat([model(row).logits[0] for row in rows])
    for way, logits in every_way(model, rows):
        assert_close(logits, expected, 1e-5, way)
        base(rows[0])
    assert_close(model(rows[1]).logits, short, 1e-5)
    assert (model(rows[0]).logits - long).abs().max() > 1e-3
    assert_close(model.as_teacher()(rows[0]).logits, long, 1e-6)
    model.save_pretrained(tmp_path)
    again = LinearizedForCausalLM.from_pretrained(tmp_path)
    assert_close(again(rows[0]).logits[0], expected[: LENGTHS[0]], 1e-6)
    assert_close(again.as_teacher()(rows[0]).logits, long, 1e-6)


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


def test_any_way_of_calling_a_student_is_the_same(name):
    model, rows = student(name), texts()
    expected = torch.cat([model(row).logits[0] for row in rows])
    original = teacher(name)(rows[0]).logits
    assert_close(model.as_teacher()(rows[0]).logits, original, 1e-6)
    assert (original - expected[:12]).abs().max() > 0.05  # the mixers do something
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    wanted = gradients(model, (expected * weight).sum())
    assert any("mixer" in key for key in wanted)
    for way, logits in every_way(model, rows):
        assert_close(logits, expected, 1e-5, way)
        if way in ("padded", "packed", f"padded, split {SPLITS[2]}", "packed, split"):
            for key, grad in gradients(model, (logits * weight).sum()).items():
                scale = max(wanted[key].norm(), 1e-2)  # a bias of keys has no gradient but rounding errors
                assert (grad - wanted[key]).norm() <= 2e-4 * scale, (way, key)
    with torch.no_grad():  # one token at a time takes the recurrent step
        for way, logits in every_way(model, rows):
            assert_close(logits, expected, 1e-5, f"{way}, no gradients")


@torch.no_grad()
def test_every_inner_mixer_fits_every_family(name):
    rows = texts()
    batch, mask = left_padded(rows)
    for mixer in INNER_MIXERS if name == "qwen3" else ("hybrid", "liger", "gated_deltanet"):
        options = {"window": 4} if "window" in INNER_MIXERS[mixer].options() else {}
        model = LinearizedForCausalLM.from_teacher(teacher(name), mixer, options, keep_layers=[1])
        expected = torch.cat([model(row).logits[0] for row in rows])
        for way, logits in every_way(model, rows):
            assert_close(logits, expected, 1e-5, f"{mixer}, {way}")
        written = [
            model.generate(batch, attention_mask=mask, max_new_tokens=4, use_cache=cached) for cached in (True, False)
        ]
        assert torch.equal(*written), mixer


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_cached_generation_is_uncached_generation(name, options):
    model = student(name)
    ids, mask = left_padded(texts())
    written = []
    for cached in (True, False):
        torch.manual_seed(4)
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=cached, **options))
    assert torch.equal(*written)
    if options == MODES["greedy"]:
        for row, alone in enumerate(texts()):
            assert torch.equal(model.generate(alone, max_new_tokens=6)[0, -6:], written[0][row, -6:])


@torch.no_grad()
def test_only_kept_layers_grow():
    teacher_model = new_teacher("mistral-global", max_position_embeddings=512)
    sizes = {}
    for keep in ((), (1,)):
        model = LinearizedForCausalLM.from_teacher(teacher_model, "plain", keep_layers=keep)
        cache = model.init_cache(2)
        for length in (8, 400):
            model(torch.ones(2, length, dtype=torch.long), past_key_values=cache)
            sizes[keep, length] = cache.nbytes
    matrices = 2 * 4 * 8 * 9 * 4  # rows, heads, D, V + 1, float32
    assert sizes[(), 8] == sizes[(), 400] == LAYERS * matrices + 2 * 8
    assert sizes[(1,), 400] >= 2 * matrices + 2 * 408 * 2 * 2 * 8 * 4  # rows, tokens, k and v, heads, D, float32
    windowed = LinearizedForCausalLM.from_teacher(teacher("mistral"), "plain", keep_layers=range(LAYERS)).init_cache(2)
    before = windowed.nbytes
    assert windowed.states[0]["keys"].shape == (2, 2, WINDOW, 8)
    kept("mistral")(torch.ones(2, 40, dtype=torch.long), past_key_values=windowed)
    assert windowed.nbytes == before


def test_the_loss_is_that_of_the_familys_own_logits(name):
    model = student(name)
    ids, mask = left_padded(texts())
    logits = model(ids, mask).logits
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    targets = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # nothing foretells a text's first token
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    output = model(ids, mask, labels=labels)
    assert output.logits is None
    assert_close(output.loss, expected, 1e-5)
    wanted = gradients(model, expected)
    for key, grad in gradients(model, output.loss).items():
        assert (grad - wanted[key]).norm() <= 2e-4 * max(wanted[key].norm(), 1e-4), key
    hidden, targets = model.hidden_states(ids)[0].detach(), labels[0]
    with torch.no_grad():
        each = model.head_loss(hidden, targets, reduction="none")
        assert_close(each, F.cross_entropy(model.head(hidden), targets, ignore_index=-100, reduction="none"), 1e-5)


def test_the_loss_is_computed_in_chunks(monkeypatch):
    """Of a head with a bias, which `linear_cross_entropy` does not take."""
    model = student("phi").train()
    rows = []
    ids = texts()[0]
    whole = model(ids, labels=ids).loss
    monkeypatch.setattr("lm_zoo.modules.loss.CHUNK_ELEMENTS", 5 * VOCAB)
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    assert_close(model(ids, labels=ids).loss, whole, 1e-6)
    assert rows == [5, 5, 2]


def test_gradient_checkpointing_changes_no_gradient(name):
    model = student(name).train()
    for module in model.modules():  # the dropout that GPT-2 and others have by default
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, cu_seqlens = packed(texts())
    wanted = gradients(model, model(ids, labels=ids, cu_seqlens=cu_seqlens).loss)
    calls = []
    model.attention_layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    found = gradients(model, model(ids, labels=ids, cu_seqlens=cu_seqlens).loss)
    assert len(calls) == 2
    assert found.keys() == wanted.keys()
    for key in found:
        assert torch.equal(found[key], wanted[key]), key
    with pytest.raises(ValueError, match="gradient checkpointing runs each block twice"):
        model(ids, use_cache=True)


def test_an_observer_stands_in_for_every_attention(name):
    model, row = student(name), texts()[0]
    seen, inputs = [], {}

    def note_input(module, args, kwargs):
        inputs[module] = [*args, *kwargs.values()]

    def observer(module, q, k, v, context):
        assert context.hidden.shape == (1, 12, 32)
        assert any(given is context.hidden for given in inputs[module])
        turned = context.rotary
        if turned is not None:
            assert turned[0].shape[:2] == turned[1].shape[:2] == (1, 12)
            assert any(given is turned for given in inputs[module])
        seen.append((module, tuple(q.shape), tuple(k.shape), turned is not None))
        return softmax(module, q, k, v, context)

    for module in model.attention_layers:
        module.register_forward_pre_hook(note_input, with_kwargs=True)

    with model.observed(observer):
        observed = model(row).logits
        with pytest.raises(ValueError, match="observer stands in for attention without a state"):
            model(row, use_cache=True)
    assert_close(observed, teacher(name)(row).logits, 1e-5)  # in packed form as well:
    ids, cu_seqlens = packed(texts())
    with model.observed(lambda *arguments: softmax(*arguments)):
        assert_close(model(ids, cu_seqlens=cu_seqlens).logits[:, :12], observed, 1e-5)
    assert [module for module, *_ in seen] == model.attention_layers
    size = model.init_cache(1).states[1]["keys"].shape[-1]
    groups = {"gpt2": 4, "gpt_neox": 4, "gemma": 1}.get(name, 2)
    assert {q for _, q, *_ in seen} == {(1, 12, 4, size)}
    assert {k for _, _, k, _ in seen} == {(1, 12, groups, size)}
    turned = {"gpt2": [False] * 3, "smollm3": [True, True, False]}.get(name, [True] * 3)
    assert [rotary for *_, rotary in seen] == turned


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_lora_by_peft_trains_the_student_alone(task):
    base = new_teacher("llama").requires_grad_(False)
    row = texts()[0]
    expected = base(row).logits
    plain = LinearizedForCausalLM.from_teacher(base, "plain", keep_layers=[1])
    before = plain(row).logits
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type=task))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted(input_ids=row).logits
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(base(row).logits, expected)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, LinearizedForCausalLM)
    assert_close(merged(row).logits, after, 1e-5)
    assert not any("lora" in key for key in merged.state_dict())


def test_bfloat16():
    for name in ("llama", "granite", "gemma3", "phi3"):
        model = LinearizedForCausalLM.from_teacher(new_teacher(name).bfloat16(), "plain", keep_layers=[1])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        rows = texts()
        batch, mask = left_padded(rows)
        with torch.no_grad():
            logits = model(batch, mask).logits
            wide = student(name)
            wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
            assert_close(logits[mask.bool()], wide(batch, mask).logits[mask.bool()], 0.05, name)
            cache = model.init_cache(3)
            halves = [model(batch[:, i : i + 6], mask[:, i : i + 6], past_key_values=cache).logits for i in (0, 6)]
            assert_close(torch.cat(halves, dim=1)[mask.bool()], logits[mask.bool()], 0.03, name)
        assert cache.states[0]["S"].dtype == torch.float32
        assert cache.states[1]["keys"].dtype == torch.bfloat16


def test_learned_positions_end():
    model = student("gpt2", max_position_embeddings=16)
    ids = torch.ones(2, 16, dtype=torch.long)
    mask = torch.tensor([[0] * 4 + [1] * 12] * 2)
    cache = model.init_cache(2)
    model(ids, mask, past_key_values=cache)
    model(ids[:, :4], past_key_values=cache)  # 20 columns, but 16 tokens
    with pytest.raises(ValueError, match="a text of 17 tokens is too long: the teacher has learned 16 positions"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, vocab_size = 61\)"):
        model(ids + VOCAB)
