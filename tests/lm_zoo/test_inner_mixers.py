"""The inner mixers of linearized transformers: their equations, and every way to call them gives the same."""

import itertools

import pytest
import torch
from compare import assert_close
from inner_mixers import (
    EXPECTED,
    HEADS,
    LENGTH,
    MIXERS,
    SCALE,
    Texts,
    call,
    expected_liger,
    gradients,
    in_parts,
    make_mixer,
    start,
)

from lm_zoo.linearized.inner import Context

AVERAGES = {"hybrid": 1, "liger": 20}  # of the values: how much larger than those the output can be


@pytest.fixture(params=list(MIXERS))
def name(request):
    return request.param


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_the_equation(name, heads, length):
    mixer, texts = make_mixer(name, heads), Texts(2, length, heads=heads)
    leaves = [*texts.requires_grad_(), *mixer.parameters()]
    y, expected = call(mixer, texts[:]), EXPECTED[MIXERS[name][0]](mixer, texts)
    assert_close(y, expected, 1e-12)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    wanted = gradients((expected * direction).sum(), leaves, materialize_grads=True, allow_unused=True)
    for a, b in zip(gradients((y * direction).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window_kind", ["sliding", "terrace"])
@pytest.mark.parametrize("window", [LENGTH, 50])
def test_a_window_longer_than_the_text_is_the_teacher(window, window_kind):
    mixer, texts = make_mixer("sliding", window=window, window_kind=window_kind), Texts(2, LENGTH)
    q, k, v = (x.transpose(1, 2) for x in (texts.q, texts.k, texts.v))
    teacher = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert_close(call(mixer, texts[:]), teacher.transpose(1, 2), 1e-12)
    with torch.no_grad():
        assert_close(in_parts(mixer, texts, [9, 1, 1, 12], start(mixer, 2)), teacher.transpose(1, 2), 1e-12)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_any_split_equals_one_call(name, heads, grad):
    mixer, texts = make_mixer(name, heads), Texts(2, LENGTH, heads=heads)
    whole = call(mixer, texts[:])
    with torch.set_grad_enabled(grad):
        for sizes in ([1] * LENGTH, [8, 1, 1, 2, 4, 1, 6], [3, 9, 11], [22, 1]):
            assert_close(in_parts(mixer, texts, sizes, start(mixer, 2)), whole, 1e-12, f"{sizes}")


def test_gradients_flow_across_calls_until_detached(name):
    mixer, texts = make_mixer(name), Texts(2, LENGTH)
    leaves = [*texts.requires_grad_(), *mixer.parameters()]
    whole = gradients(call(mixer, texts[:]).square().sum(), leaves)
    state = start(mixer, 2)
    parts = in_parts(mixer, texts, [7, 1, 1, 9, 5], state)
    for a, b in zip(gradients(parts.square().sum(), leaves), whole, strict=True):
        assert_close(a, b, 1e-11, "gradient")
    state.detach_()
    more = Texts(2, 9)
    more.requires_grad_()
    later = call(mixer, more[:], state)
    assert all(grad is None for grad in gradients(later.sum(), leaves[:3], allow_unused=True))

    state = start(mixer, 2)
    in_parts(mixer, texts, [9, 4], state)
    with torch.no_grad():
        in_parts(mixer, more, [1] * 9, state)  # whoever writes without gradients drops the graph of what was there
    later = call(mixer, more[:], state)
    assert all(grad is None for grad in gradients(later.sum(), leaves[:3], allow_unused=True))


def test_packed_texts_equal_each_alone(name):
    mixer, texts = make_mixer(name), Texts(1, LENGTH)
    leaves = texts.requires_grad_()
    bounds = [0, 0, 4, 5, 5, 18, 23, 23]
    alone = torch.cat([call(mixer, texts[slice(a, b)]) for a, b in itertools.pairwise(bounds) if a < b], dim=1)
    packed = call(mixer, texts[:], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_close(packed, alone, 1e-12)
    wanted = gradients(alone.square().sum(), leaves)
    for a, b in zip(gradients(packed.square().sum(), leaves), wanted, strict=True):
        assert_close(a, b, 1e-11, "gradient")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_packed_texts_continue_their_own_rows(name, grad):
    """Packed calls with ragged and empty texts, then dense calls at positions that differ between the rows."""
    mixer, texts = make_mixer(name), [Texts(1, 27, seed) for seed in range(3)]
    expected = [call(mixer, text[:]) for text in texts]
    state, outputs, done = start(mixer, 3), [[], [], []], [0, 0, 0]
    with torch.set_grad_enabled(grad):
        for sizes in ([4, 0, 9], [5, 8, 1], [1, 0, 0], [3, 0, 5]):
            parts = [text[slice(d, d + n)] for text, d, n in zip(texts, done, sizes, strict=True)]
            inputs = [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]
            y = call(mixer, inputs, state, torch.tensor([0, *itertools.accumulate(sizes)]))
            for row, part in enumerate(y.split(sizes, dim=1)):
                outputs[row].append(part)
            done = [d + n for d, n in zip(done, sizes, strict=True)]
        for size in (1, 2, 1, 1, 1, 1, 1, 3, 1):
            parts = [text[slice(d, d + size)] for text, d in zip(texts, done, strict=True)]
            y = call(mixer, [torch.cat(tensors) for tensors in zip(*parts, strict=True)], state)
            for row in range(3):
                outputs[row].append(y[row : row + 1])
            done = [d + size for d in done]
    for parts, whole in zip(outputs, expected, strict=True):
        y = torch.cat(parts, dim=1)
        assert_close(y, whole[:, : y.shape[1]], 1e-12)


def test_the_future_is_not_seen(name):
    mixer, texts, changed = make_mixer(name), Texts(1, LENGTH), Texts(1, LENGTH)
    for x in (changed.q, changed.k, changed.v, changed.hidden):
        x[:, 11:] = 7.0
    torch.testing.assert_close(call(mixer, changed[:])[:, :11], call(mixer, texts[:])[:, :11], rtol=0, atol=1e-13)


def test_float32_and_bfloat16(name):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        mixer, texts = make_mixer(name, dtype=dtype), Texts(2, 40, dtype=dtype)
        exact, wide = make_mixer(name), Texts(2, 40)
        exact.load_state_dict(mixer.state_dict())
        wide.q, wide.k, wide.v = texts.q.double(), texts.k.double(), texts.v.double()
        wide.hidden = texts.hidden.double()
        wide.rotary = tuple(x.double() for x in texts.rotary)
        expected = call(exact, wide[:])
        state = start(mixer, 2, dtype)
        assert state["S"].dtype == torch.float32
        whole = call(mixer, texts[:])
        with torch.no_grad():
            parts = in_parts(mixer, texts, [17, *[1] * 23], state)
        for what, y in (("whole", whole), ("parts", parts)):
            assert y.dtype == dtype
            assert_close(y, expected, tolerance, f"{what} in {dtype}")


def test_autocast(name):
    mixer, texts = make_mixer(name, dtype=torch.float32), Texts(2, 12, dtype=torch.float32)
    state = start(mixer, 2, torch.bfloat16)
    expected = call(mixer, texts[:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Liger's window rounds, and the registered mixers' gates.
        assert_close(call(mixer, texts[:]), expected, 1e-6 if MIXERS[name][0] == "hybrid" else 2e-2)
        with torch.no_grad():
            assert_close(in_parts(mixer, texts, [7, 1, 1, 3], state), expected, 2e-2)


def test_ten_thousand_tokens(name):
    mixer, texts = make_mixer(name, dtype=torch.float32), Texts(1, 10_003, dtype=torch.float32)
    texts.q, texts.k = texts.q * 20, texts.k * 20  # scores in the thousands
    with torch.no_grad():
        whole = call(mixer, texts[:])
        y = in_parts(mixer, texts, [10_000, 1, 1, 1], start(mixer, 1, torch.float32))
    assert torch.isfinite(whole).all()
    assert_close(y[:, -3:], whole[:, -3:], 1e-5)
    if MIXERS[name][0] in AVERAGES:
        assert whole.abs().max() <= texts.v.abs().max() * AVERAGES[MIXERS[name][0]]


# torch.compile itself makes an instance of autograd functions that it meets
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_parallel_form_compiles_whole(name):
    mixer, texts = make_mixer(name), Texts(2, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_close(compiled(mixer, texts[:]), call(mixer, texts[:]), 1e-12)


def test_positions_need_not_be_turned():
    """GPT-2 has learned positions: q and k come as they are."""
    mixer, texts = make_mixer("liger"), Texts(2, LENGTH)
    texts.q, texts.k = texts.plain_q, texts.plain_k
    y = mixer(texts.q, texts.k, texts.v, context=Context(), state=None, cu_seqlens=None)
    assert_close(y, expected_liger(mixer, texts), 1e-12)
