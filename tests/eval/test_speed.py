"""Speeds are measured on a machine that others use too, so only their structure is tested; bytes of state are exact."""

import pytest
import torch

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.speed import decode_speed, training_speed


def model(preset: str) -> ZooForCausalLM:
    return ZooForCausalLM(ZooConfig.preset(preset, vocab_size=64, hidden_size=32, num_hidden_layers=2))


def test_gla_state_is_constant():
    short, long = (decode_speed(model("gla-tiny"), context, steps=3) for context in (8, 64))
    # 2 layers of 2 heads, K = 8, V = 16, float32
    assert short.state_bytes == long.state_bytes == 2 * 2 * 8 * 16 * 4
    assert (short.context, long.context) == (8, 64)
    assert short.tokens_per_second > 0


def test_softmax_attention_state_grows_with_the_context():
    short, long = (decode_speed(model("transformer-tiny"), context, steps=3) for context in (64, 256))
    # 2 layers of keys and values of 32 channels, float32
    assert long.state_bytes - short.state_bytes == 192 * 2 * 2 * 32 * 4


def test_batch_counts_all_its_rows():
    assert decode_speed(model("gla-tiny"), 8, batch_size=3, steps=3).state_bytes == 3 * 2 * 2 * 8 * 16 * 4


def test_training_speed_leaves_the_model_as_it_was():
    measured = model("gla-tiny").eval()
    before = {name: tensor.clone() for name, tensor in measured.state_dict().items()}
    assert training_speed(measured, 32, batch_size=2, steps=2) > 0
    assert not measured.training
    assert all(parameter.grad is None for parameter in measured.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in measured.state_dict().items())


@pytest.mark.parametrize("name", ["context", "batch_size", "steps"])
def test_refuses_sizes_below_one(name):
    sizes = {"context": 8, "batch_size": 1, "steps": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        decode_speed(model("gla-tiny"), sizes.pop("context"), **sizes)
