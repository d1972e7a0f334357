"""The states of the inner mixers, which the caller owns, and their options."""

import pytest
import torch
from compare import assert_close
from inner_mixers import LENGTH, MIXERS, D, Texts, call, in_parts, make_mixer, start

from lm_zoo.layers import LayerState
from lm_zoo.linearized.hybrid import HybridAttention
from lm_zoo.linearized.inner import INNER_MIXERS
from lm_zoo.linearized.liger import LigerAttention
from lm_zoo.modules.feature_maps import FEATURE_MAPS


@pytest.fixture(params=list(MIXERS))
def name(request):
    return request.param


def test_state_selects_reorders_puts_and_resets(name):
    mixer, texts, more = make_mixer(name), Texts(3, 9), Texts(3, 14)

    def rows(inputs, index):
        return [x if len(x) == 1 else x[index] for x in inputs]

    def continued(state, index):
        return torch.cat([call(mixer, rows(more[t : t + 1], index), state) for t in range(9, 14)], dim=1)

    texts.q, texts.k, texts.v, texts.hidden = (x[:, :9] for x in (more.q, more.k, more.v, more.hidden))
    expected = call(mixer, more[:])[:, 9:]
    with torch.no_grad():
        state = start(mixer, 3)
        call(mixer, texts[:], state)
        index = torch.tensor([2, 0, 0, 1, 2])
        assert_close(continued(state.select(index), index), expected[index], 1e-12, "selected")

        copy, single = state.clone(), state.select(torch.tensor([1]))
        addresses = {key: tensor.data_ptr() for key, tensor in copy.tensors.items()}
        index = torch.tensor([1, 1, 0])
        copy.reorder_(index)
        assert {key: tensor.data_ptr() for key, tensor in copy.tensors.items()} == addresses
        assert_close(continued(copy, index), expected[index], 1e-12, "reordered")

        copy.reset()
        call(mixer, texts[:], copy)
        copy.put(2, single)
        index = torch.tensor([0, 1, 1])
        assert_close(continued(copy, index), expected[index], 1e-12, "put")

        assert_close(continued(state, torch.arange(3)), expected, 1e-12, "the original")
        state.reset()
        assert_close(call(mixer, texts[:], state), call(mixer, texts[:]), 1e-12, "reset")


def test_a_row_of_another_length_can_be_put_and_moved(name):
    mixer, long, short = make_mixer(name), Texts(1, 14, seed=2), Texts(1, 10, seed=3)
    whole = call(mixer, long[:]), call(mixer, short[:])
    with torch.no_grad():
        state, other = start(mixer, 2), start(mixer, 1)
        call(mixer, [torch.cat([x, x]) for x in long[:9]], state)
        call(mixer, short[:2], other)
        state.clone().put(0, other)
        state.put(1, other)
        pairs = [[torch.cat(x) for x in zip(short[2 + t : 3 + t], long[9 + t : 10 + t], strict=True)] for t in range(5)]
        swapped = torch.tensor([1, 0])
        parts = [call(mixer, [x[swapped] for x in pair], state) for pair in pairs[:2]]
        state.reorder_(swapped)
        y = torch.cat([part[swapped] for part in parts] + [call(mixer, pair, state) for pair in pairs[2:]], dim=1)
    assert_close(y[:1], whole[1][:, 2:7], 1e-12, "short")
    assert_close(y[1:], whole[0][:, 9:], 1e-12, "long")


def test_state_stays_in_its_place_at_the_key_heads_number(name):
    mixer = make_mixer(name, dtype=torch.float32)
    state = start(mixer, 2, torch.float32)
    assert isinstance(state, LayerState)
    assert all(len(tensor) == 2 for tensor in state.tensors.values())
    if "window" in MIXERS[name][1] and not name.startswith("hedgehog"):
        assert state["keys"].shape[1] == 2
    addresses, size = {key: tensor.data_ptr() for key, tensor in state.tensors.items()}, state.nbytes
    with torch.no_grad():
        in_parts(mixer, Texts(2, 70, dtype=torch.float32), [30, 1, 1, 38], state)
    assert ({key: tensor.data_ptr() for key, tensor in state.tensors.items()}, state.nbytes) == (addresses, size)
    assert mixer.init_state(1, device=torch.device("meta"), dtype=torch.float32).batch_size == 1


def test_gamma_starts_at_a_tenth_and_features_at_the_identity():
    mixer = INNER_MIXERS["hybrid"](num_heads=4, num_kv_heads=2, head_size=D, scale=1.0, hidden_size=24)
    torch.testing.assert_close(mixer.window_gate.sigmoid(), torch.full((4,), 0.1))
    assert torch.equal(mixer.k_map.weight, torch.eye(D).expand(4, D, D))
    assert sum(p.numel() for p in INNER_MIXERS["liger"](**geometry()).parameters()) == 0
    assert "window_gate" not in dict(make_mixer("hedgehog").named_parameters())


def test_window_dropout_trains_the_features_alone():
    mixer, texts = make_mixer("terrace", window_dropout=1.0), Texts(2, LENGTH)
    alone = make_mixer("hedgehog")
    alone.load_state_dict({key: value for key, value in mixer.state_dict().items() if key != "window_gate"})
    assert_close(call(mixer.train(), texts[:]), call(alone, texts[:]), 1e-12, "dropped")
    kept = call(make_mixer("terrace"), texts[:])
    assert_close(call(mixer.eval(), texts[:]), kept, 1e-12, "not in training")
    with torch.no_grad():
        assert_close(in_parts(mixer.train(), texts, [9, 14], start(mixer, 2)), kept, 1e-12, "never with a state")
    mixer = make_mixer("terrace", window_dropout=0.5).train()
    torch.manual_seed(1)
    outputs = {round(call(mixer, texts[:]).sum().item(), 6) for _ in range(20)}
    assert outputs == {round(y.sum().item(), 6) for y in (kept, call(alone, texts[:]))}


def geometry(**changes):
    return {"num_heads": 4, "num_kv_heads": 2, "head_size": D, "scale": 1.0, "hidden_size": 24} | changes


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        ("hybrid", {"window": -1}, ValueError, "window must be at least 0, got -1"),
        ("hybrid", {"window": 4.0}, TypeError, "window must be an integer, got 4.0"),
        ("hybrid", {"window": True}, TypeError, "window must be an integer"),
        ("hybrid", {"window_kind": "square"}, ValueError, "window_kind must be one of 'sliding', 'terrace'"),
        ("hybrid", {"feature_map": "identity"}, ValueError, "feature_map must be one of .*'hedgehog'.*got 'identity'"),
        ("hybrid", {"feature_map_per": "head"}, ValueError, "feature_map_per must be one of"),
        ("hybrid", {"beta": 1}, ValueError, "beta must be one of 'one', 'complement', got 1"),
        ("hybrid", {"window_dropout": 1.5}, ValueError, r"window_dropout must be in \[0, 1\], got 1.5"),
        ("hybrid", {"window_dropout": True}, TypeError, "window_dropout must be a number"),
        ("hybrid", {"windows": 3}, TypeError, "windows"),
        ("liger", {"window": 0}, ValueError, "window must be at least 1, got 0"),
        ("liger", {"share": -0.1}, ValueError, r"share must be in \[0, 1\], got -0.1"),
        ("liger", {"share": "half"}, TypeError, "share must be a number"),
    ],
)
def test_impossible_options_are_rejected_at_once(mixer, options, error, message):
    with pytest.raises(error, match=message):
        INNER_MIXERS[mixer](**geometry(), **options)


def test_bad_calls_name_the_argument(name):
    mixer, texts = make_mixer(name), Texts(2, 5)
    with pytest.raises(ValueError, match="state must have B = 2 rows, got 3"):
        call(mixer, texts[:], start(mixer, 3))
    with pytest.raises(ValueError, match="state must have N = 2 rows, got 3"):
        call(mixer, Texts(1, 5)[:], start(mixer, 3), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="cu_seqlens must end at T = 5, got 4"):
        call(mixer, Texts(1, 5)[:], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="B must be 1, got B = 2"):
        call(mixer, texts[:], cu_seqlens=torch.tensor([0, 5]))


def test_the_registry_and_the_maps():
    assert INNER_MIXERS["hybrid"] is HybridAttention
    assert INNER_MIXERS["liger"] is LigerAttention
    for feature_map in (name for name, kind in FEATURE_MAPS.items() if kind.positive):
        mixer = make_mixer("terrace", feature_map=feature_map)
        texts = Texts(1, 9)
        assert torch.isfinite(call(mixer, texts[:])).all()
