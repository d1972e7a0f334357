"""The convolution that recall tasks have in front of every mixer."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.synthetic.front import put_convolutions_first
from lm_zoo.eval.synthetic.training import state_elements

SIZES = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 0}


def model_with(mixer: str) -> ZooForCausalLM:
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES, mixers={mixer: {"num_heads": 2}}))
    put_convolutions_first(model, 3)
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


def test_it_convolves_the_input_of_the_mixer():
    model = model_with("gla")
    block = model.model.layers[0].mixer
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    mixed = F.conv1d(F.pad(x.mT, (2, 0)), block.conv.weight[:, None], groups=32).mT
    assert_close(block(x), block.mixer(mixed), 1e-12)


def test_its_inputs_count_as_state():
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES, mixers={"gla": {"num_heads": 2}}))
    without = state_elements(model, 8)
    put_convolutions_first(model, 3)
    assert state_elements(model, 8) == without + 2 * 32 * (3 - 1)
