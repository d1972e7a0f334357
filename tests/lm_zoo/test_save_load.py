"""A model goes to a Hugging Face folder and comes back the same."""

import json

import pytest
import torch
from compare import assert_close
from transformers import AutoModelForCausalLM

from lm_zoo import MIXERS, ZooForCausalLM


@pytest.mark.parametrize("name", [*MIXERS, "hybrid"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip(make_model, tokens, tmp_path, name, tied):
    model = make_model(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ZooForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ZooForCausalLM
    assert not again.training
    assert again.dtype == torch.float64
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = tokens(2, 9)
    assert_close(again(ids).logits, model(ids).logits, 1e-12)
    assert torch.equal(again.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    tensors = model.state_dict().items()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in tensors)


def test_another_dtype(make_model, tmp_path):
    model = make_model("hybrid", torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_several_files(make_model, tokens, tmp_path):
    model = make_model("hybrid")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = tokens(1, 5)
    assert_close(ZooForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits, 1e-12)


def test_more_tokens(make_model, tokens):
    """Embeddings can be resized, as adapting a model to another tokenizer needs."""
    for tied in (True, False):
        model = make_model("gla", tie_word_embeddings=tied)
        ids = tokens(1, 5)
        before = model(ids).logits
        model.resize_token_embeddings(80, mean_resizing=False)
        after = model(ids).logits
        assert model.config.vocab_size == after.shape[-1] == 80
        torch.testing.assert_close(after[..., : before.shape[-1]], before)
