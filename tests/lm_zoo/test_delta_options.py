"""The delta family and Mamba-2: initial values, dtypes of the gates, and options that cannot be."""

import math

import pytest
import torch
import torch.nn.functional as F

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers import MIXERS, DeltaProduct, GatedDeltaNet, KimiDeltaAttention, Mamba2
from lm_zoo.modules.decay import SoftplusDecay
from lm_zoo.modules.short_conv import ShortConvolution

WIDE = {  # 96 heads of few channels, so that initial values have statistics
    "deltanet": {"num_heads": 96},
    "gated_deltanet": {"num_heads": 96, "expand_k": 1.0, "expand_v": 1.0},
    "deltaproduct": {"num_heads": 96, "gated": True},
    "kda": {"num_heads": 96},
    "mamba2": {"head_size": 2, "state_size": 4},
}


def test_initial_values_also_of_a_model_built_without_memory():
    config = ZooConfig(vocab_size=50, hidden_size=96, num_hidden_layers=5, mixers=WIDE)
    with torch.device("meta"):
        late = ZooForCausalLM(config)
    late.to_empty(device="cpu")
    late.init_weights()
    for module in (*ZooForCausalLM(config).modules(), *late.modules()):
        if isinstance(module, SoftplusDecay):
            rate, dt = module.A_log.exp(), F.softplus(module.dt_bias)
            low, high = module.rates
            assert low <= rate.min() < low + 2 < high - 2 < rate.max() <= high
            assert 0.00099 < dt.min() < 0.002 < 0.05 < dt.max() < 0.101
        elif isinstance(module, GatedDeltaNet | DeltaProduct):
            assert module.log_decay.rates == (0, 16)
        elif isinstance(module, KimiDeltaAttention):
            assert module.log_decay.rates == (1, 16)
        elif isinstance(module, ShortConvolution):
            for parameter in (module.weight, *([] if module.bias is None else [module.bias])):
                assert 0.45 < parameter.abs().max() <= 0.5
                assert abs(parameter.std() - 0.5 / math.sqrt(3)) < 0.05
        elif isinstance(module, Mamba2):
            assert module.log_decay.rates == (1, 16)
            assert (module.D == 1).all()


def test_time_steps_and_rates_fill_their_ranges():
    torch.manual_seed(0)
    gate = SoftplusDecay(20_000, rates=(0.0, 16.0)).double()
    rate, dt = gate.A_log.exp(), F.softplus(gate.dt_bias)
    assert 0 < rate.min() < 0.01 < 15.99 < rate.max() < 16.001
    assert abs(rate.mean() - 8) < 0.1
    assert 0.0009999 < dt.min() < 0.001002 < 0.0998 < dt.max() < 0.10001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.03


@pytest.mark.parametrize(("name", "options"), WIDE.items(), ids=WIDE)
def test_a_token_takes_the_recurrent_step(name, options, monkeypatch):
    layer = MIXERS[name](96, **options)
    state = layer.init_state(2)
    monkeypatch.setattr("lm_zoo.layers.base.linear_attention", None)
    with torch.no_grad():
        assert layer(torch.ones(2, 1, 96), state=state).shape == (2, 1, 96)
    with pytest.raises(TypeError, match="NoneType"):
        layer(torch.ones(2, 2, 96), state=state)


@pytest.mark.parametrize(("name", "options"), WIDE.items(), ids=WIDE)
def test_decays_are_computed_in_float32_and_spared_by_weight_decay(name, options):
    from lm_zoo.train.optim import parameter_groups  # brings Lightning along

    layer = MIXERS[name](96, **options).bfloat16()
    decayed = {id(parameter) for parameter in parameter_groups(layer, 0.1)[0]["params"]}
    assert id(layer.conv.weight) in decayed
    gates = [module for module in layer.modules() if isinstance(module, SoftplusDecay)]
    assert len(gates) == (name != "deltanet")
    for gate in gates:
        assert not decayed & {id(gate.A_log), id(gate.dt_bias)}
        assert gate(torch.zeros(1, 2, *gate.dt_bias.shape, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("deltanet", {"num_heads": 3}, ValueError, "expand_k = 1.0 makes hidden_size = 64 to 64 channels"),
        ("deltanet", {"conv_size": 0}, ValueError, "conv_size must be at least 1, got 0"),
        ("deltanet", {"use_gate": 1}, TypeError, "use_gate must be True or False, got 1"),
        ("gated_deltanet", {"use_gate": None}, TypeError, "use_gate must be True or False, got None"),
        ("deltanet", {"allow_negative_eigenvalues": "yes"}, TypeError, "allow_negative_eigenvalues must be True or"),
        ("deltanet", {"norm_eps": -1.0}, ValueError, "norm_eps must be positive"),
        ("deltanet", {"conv_bias": True}, TypeError, "conv_bias"),
        ("gated_deltanet", {"num_heads": 4, "num_value_heads": 6}, ValueError, "multiple of num_heads = 4, got 6"),
        ("gated_deltanet", {"num_value_heads": 0}, ValueError, "num_value_heads must be at least 1"),
        ("gated_deltanet", {"expand_v": 0.7}, ValueError, "expand_v = 0.7 makes hidden_size = 64"),
        ("gated_deltanet", {"allow_negative_eigenvalues": 2}, TypeError, "allow_negative_eigenvalues must be True or"),
        ("deltaproduct", {"num_householders": 0}, ValueError, "num_householders must be at least 1, got 0"),
        ("deltaproduct", {"num_householders": 1.5}, TypeError, "num_householders must be an integer, got 1.5"),
        ("deltaproduct", {"gated": None}, TypeError, "gated must be True or False, got None"),
        ("kda", {"num_heads": 5}, ValueError, "num_heads = 5 does not divide hidden_size = 64"),
        ("kda", {"head_size": 0}, ValueError, "head_size must be at least 1, got 0"),
        ("kda", {"allow_negative_eigenvalues": 0}, TypeError, "allow_negative_eigenvalues must be True or False"),
        ("mamba2", {"head_size": 48}, ValueError, "head_size = 48 does not divide the 128 channels"),
        ("mamba2", {"expand": 0}, ValueError, "expand must be positive"),
        ("mamba2", {"num_groups": 3}, ValueError, "num_groups must divide the 2 heads, got 3"),
        ("mamba2", {"state_size": -1}, ValueError, "state_size must be at least 1"),
        ("mamba2", {"dt_limit": 0.1}, TypeError, "dt_limit must be two numbers, the least and the greatest, got 0.1"),
        ("mamba2", {"dt_limit": [0.2, 0.1]}, ValueError, r"dt_limit must be 0 <= least < greatest, got \[0.2, 0.1\]"),
        ("mamba2", {"dt_limit": ("0", "1")}, TypeError, "dt_limit must be two numbers"),
    ],
)
def test_impossible_options_are_rejected_at_once(name, options, error, message):
    with pytest.raises(error, match=message):
        MIXERS[name](**{"hidden_size": 64, **options})
