"""The gated convolution that takes turns with the mixer in recall tasks."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.synthetic.front import GatedConvolution, put_convolutions_between
from lm_zoo.eval.synthetic.training import state_elements
from lm_zoo.layers import GatedLinearAttention

SIZES = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 0}


def model_with(mixer: str) -> ZooForCausalLM:
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES, mixers={mixer: {"num_heads": 2}}))
    put_convolutions_between(model, 3)
    return model.double()


@pytest.mark.parametrize("mixer", ["gla", "deltanet", "attention"])
def test_any_split_of_a_text_gives_the_same(mixer):
    model = model_with(mixer)
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.init_cache(2)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 2, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole, 1e-10)


def test_a_gated_convolution_is_its_equation():
    layer = model_with("gla").model.layers[0].mixer
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    mixed = F.conv1d(F.pad(x.mT, (2, 0)), layer.conv.weight[:, None], layer.conv.bias, groups=32).mT
    assert_close(layer(x), x + mixed * (x @ layer.proj.weight.T + layer.proj.bias), 1e-12)


def test_blocks_take_turns_from_the_first():
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES | {"num_hidden_layers": 3}, mixers={"gla": {"num_heads": 2}}))
    put_convolutions_between(model, 3)
    assert [type(block.mixer) for block in model.model.layers] == [
        GatedConvolution,
        GatedLinearAttention,
        GatedConvolution,
    ]
    assert model.model.layers[2].mixer.proj.weight.std() < 2 * model.config.initializer_range


def test_its_inputs_count_as_state():
    model = model_with("gla")
    assert state_elements(model.float(), 8) == 2 * 8 * 16 + 32 * (3 - 1)
