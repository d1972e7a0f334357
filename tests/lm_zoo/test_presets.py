"""Presets: as large as what was published, and every mixer has a tiny one that trains and generates."""

import pytest
import torch

from lm_zoo import MIXERS, ZooConfig, ZooForCausalLM

# Preset -> parameters as published, and where. The size of a file in bfloat16 or float16 is 2 bytes for each of them.
PUBLISHED = {
    "transformer-340m": (340e6, "arXiv 2312.06635"),
    "transformer-1.3b": (1.36e9, "model card of fla-hub/transformer-1.3B-100B"),
    "gla-340m": (683e6 / 2, "file of fla-hub/gla-340M-15B"),
    "gla-1.3b": (1.37e9, "model card of fla-hub/gla-1.3B-100B"),
    "retnet-340m": (340e6, "arXiv 2312.06635, as a baseline"),
    "retnet-1.3b": (2.70e9 / 2, "file of fla-hub/retnet-1.3B-100B"),
    "deltanet-340m": (340e6, "arXiv 2406.06484"),
    "deltanet-1.3b": (2.73e9 / 2, "file of fla-hub/delta_net-1.3B-100B"),
    "deltaproduct-392m": (392e6, "arXiv 2502.10297"),
    "gated-deltanet-360m": (357_781_928, "model card of puigde/gated-deltanet-360M-15B-slimpajama"),
    "hgrn-150m": (150e6, "OpenNLPLab/HGRN-150M"),
    "hgrn-340m": (340e6, "arXiv 2507.06457, as a baseline"),
    "hgrn-1.3b": (1.36e9, "model card of fla-hub/hgrn-1.3B-100B"),
    "hgrn2-340m": (340e6, "arXiv 2507.06457, as a baseline"),
    "hgrn2-1.3b": (2.73e9 / 2, "file of fla-hub/hgrn2-1.3B-100B"),
    "lightning-385m": (385e6, "arXiv 2307.14995"),
    "lightning-1b": (1.0e9, "arXiv 2307.14995"),
    "mamba-370m": (370e6, "arXiv 2312.00752"),
    "mamba-1.4b": (1.4e9, "arXiv 2312.00752"),
    "mamba2-370m": (737e6 / 2, "file of AntonV/mamba2-370m-hf"),
    "mamba2-1.3b": (2.69e9 / 2, "file of AntonV/mamba2-1.3b-hf"),
}
UNCHECKED = {"gated-deltanet-1.3b"}  # its file says why
TINY = sorted(name for name in ZooConfig.presets() if name.endswith("-tiny"))


def parameters(name: str) -> int:
    with torch.device("meta"):
        return ZooForCausalLM(ZooConfig.preset(name)).num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    published, source = PUBLISHED[name]
    counted = parameters(name)
    assert abs(counted / published - 1) < 0.03, f"{counted:,} parameters, but {published:,.0f} in {source}"


def test_every_preset_has_a_published_count_or_is_tiny():
    assert sorted([*PUBLISHED, *UNCHECKED, *TINY]) == ZooConfig.presets()


def test_every_mixer_has_a_tiny_preset():
    assert set(MIXERS) <= {name for preset in TINY for name in ZooConfig.preset(preset).pattern}


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_train_and_generate(name):
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig.preset(name))
    tokens = torch.randint(1, 4096, (2, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(tokens, labels=tokens).loss
    before.backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"without a gradient: {without}"
    optimizer.step()
    after = model(tokens, labels=tokens).loss
    assert after < before - 0.01
    model.generation_config.pad_token_id = 0
    assert model.eval().generate(tokens[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)
