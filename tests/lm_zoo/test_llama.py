"""A softmax transformer of the zoo is a Llama under other names."""

import pytest
import torch
from compare import assert_close

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.errors import UserError
from lm_zoo.llama import as_llama, llama_config

GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_size": 6, "rope_base": 500.0}
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "norm_eps": 1e-3}


def transformer(attention: dict, **changes) -> ZooForCausalLM:
    """Of random parameters, norms as well."""
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES, **changes, mixers={"attention": attention}, eos_token_id=7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.double()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("attention", [{"num_heads": 4}, GROUPED], ids=["plain", "grouped"])
def test_the_same_logits_from_the_same_weights(attention, tied):
    model = transformer(attention, tie_word_embeddings=tied)
    llama = as_llama(model)
    ids = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(0))
    assert_close(llama(ids).logits, model(ids).logits, 1e-5)  # a Llama's angles are float32
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in llama.parameters()} == shared
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    assert (llama.config.eos_token_id, llama.generation_config.eos_token_id) == (7, 7)
    assert not llama.training


OTHERS = {
    "another mixer": ({"mixers": {"gla": {"num_heads": 2}}}, "softmax attention throughout"),
    "a hybrid": ({"mixers": {"attention": {"num_heads": 4}, "gla": {"num_heads": 2}}}, "softmax attention throughout"),
    "a window": ({"mixers": {"attention": {"num_heads": 4, "window": 8}}}, "window=8"),
    "no MLP": ({"mixers": {"attention": {"num_heads": 4}}, "intermediate_size": 0}, "intermediate_size=0"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused(case):
    options, message = OTHERS[case]
    with pytest.raises(UserError, match=message):
        llama_config(ZooConfig(**SIZES, **options))
