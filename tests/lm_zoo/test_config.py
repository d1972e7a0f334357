"""ZooConfig: presets, derived sizes, and every wrong option named at construction."""

import json
import pathlib

import pytest
import torch
import yaml
from transformers import AutoConfig

from lm_zoo import MIXERS, ZooConfig, ZooForCausalLM

PRESET_FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"


def test_presets_are_the_files_in_configs():
    assert ZooConfig.presets() == sorted(file.stem for file in PRESET_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", ZooConfig.presets())
def test_every_preset_builds(name):
    with torch.device("meta"):
        model = ZooForCausalLM(ZooConfig.preset(name))
    if name.endswith("-340m"):
        assert 340e6 < model.num_parameters() < 385e6
    if name.endswith("-tiny"):
        assert model.num_parameters() < 2e6
    fields = yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text())
    assert all(getattr(model.config, field) == value for field, value in fields.items())


def test_a_preset_takes_other_sizes():
    config = ZooConfig.preset("hybrid-tiny", vocab_size=100, hidden_size=256)
    assert (config.vocab_size, config.hidden_size, config.pattern[-1]) == (100, 256, "attention")
    assert config.intermediate_size == 704  # 8/3 of 256, up to a multiple of 64


def test_defaults():
    config = ZooConfig()
    assert config.pattern == list(config.mixers)
    assert config.intermediate_size == 2752
    assert ZooConfig(mixers={"retnet": {}, "attention": {"num_heads": 4}}).pattern == ["retnet", "attention"]
    assert ZooConfig(norm_eps=1e-4).build_mixer("gla").norm.eps == 1e-4
    assert ZooConfig(mixers={"gla": {"norm_eps": 1e-3}}).build_mixer("gla").norm.eps == 1e-3


def test_round_trip(tmp_path):
    config = ZooConfig.preset("hybrid-tiny", norm_eps=1e-5, eos_token_id=[1, 2], pad_token_id=0)
    config.save_pretrained(tmp_path)
    for again in (AutoConfig.from_pretrained(tmp_path), ZooConfig.from_pretrained(tmp_path), ZooConfig(**vars(config))):
        assert isinstance(again, ZooConfig)
        for name in ("mixers", "pattern", "norm_eps", "eos_token_id", "intermediate_size", "tie_word_embeddings"):
            assert getattr(again, name) == getattr(config, name)
    changed = AutoConfig.from_pretrained(tmp_path, vocab_size=7)
    assert changed.vocab_size == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hiden_size": 64}, ValueError, r"unknown option 'hiden_size' for ZooConfig \(did you mean 'hidden_size'\?\)"),
        ({"hidden_size": "64"}, TypeError, "hidden_size must be an integer, got '64'"),
        ({"hidden_size": True}, TypeError, "hidden_size must be an integer, got True"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be at least 1, got 0"),
        ({"intermediate_size": 1.5}, TypeError, "intermediate_size must be an integer, got 1.5"),
        ({"intermediate_size": -1}, ValueError, "intermediate_size must be at least 0, got -1"),
        ({"vocab_size": None}, TypeError, "vocab_size must be an integer, got None"),
        ({"norm_eps": 0}, ValueError, "norm_eps must be between 0 and 1"),
        ({"initializer_range": "big"}, TypeError, "initializer_range must be a number"),
        ({"tie_word_embeddings": "yes"}, TypeError, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"eos_token_id": 32000}, ValueError, r"eos_token_id must be in \[0, vocab_size = 32000\), got 32000"),
        ({"pad_token_id": "0"}, TypeError, "pad_token_id must be an integer or null, got '0'"),
        ({"mixers": ["gla"]}, TypeError, r"mixers must map names to keyword arguments, got \['gla'\]"),
        ({"mixers": {}}, TypeError, "mixers must map names"),
        ({"mixers": {"gla": None}}, TypeError, r"mixers\['gla'\] must hold keyword arguments, {} if there are none"),
        ({"mixers": {"retnt": {}}}, ValueError, r"'retnt', which is no mixer of lm_zoo \(did you mean 'retnet'\?\)"),
        (
            {"mixers": {"mine": {"type": "rnn"}}},
            ValueError,
            "'rnn', which is no mixer.*known: attention, .*gla, .*retnet",
        ),
        ({"mixers": {"mine": {"type": 3}}}, ValueError, "mixers has 3, which is no mixer"),
        ({"mixers": {"gla": {"heads": 4}}}, ValueError, "unknown option 'heads' for the mixer 'gla'.*known: expand_k"),
        ({"mixers": {"gla": {"hidden_size": 4}}}, ValueError, "unknown option 'hidden_size' for the mixer 'gla'"),
        (
            {"mixers": {"gla": {"num_heads": 3}}},
            ValueError,
            r"mixers\['gla'\]: expand_k = 0.5 makes hidden_size = 1024",
        ),
        ({"mixers": {"gla": {"num_heads": "4"}}}, TypeError, r"mixers\['gla'\]: num_heads must be an integer, got '4'"),
        ({"pattern": ["gla", "retnet"]}, ValueError, "pattern has 'retnet', which is not in mixers; known: gla"),
        ({"pattern": "gla"}, TypeError, "pattern must be a list of names from mixers, got 'gla'"),
        ({"pattern": []}, TypeError, r"pattern must be a list of names from mixers, got \[\]"),
        ({"pattern": [["gla"]]}, TypeError, "pattern must be a list of names"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ZooConfig(**options)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"no preset 'gla-tny' \(did you mean 'gla-tiny'\?\); known: .*gla-340m"):
        ZooConfig.preset("gla-tny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ["mamba3"]}, "pattern has 'mamba3', which is not in mixers"),
        ({"mixers": {"glaa": {}}, "pattern": ["glaa"]}, r"'glaa', which is no mixer of lm_zoo \(did you mean 'gla'"),
        (
            {"mixers": {"gla": {"num_head": 2}}},
            r"unknown option 'num_head' for the mixer 'gla' \(did you mean 'num_heads'",
        ),
        ({"hidden_siz": 3}, "unknown option 'hidden_siz' for ZooConfig"),
    ],
)
def test_a_folder_of_another_version_is_refused_by_name(tmp_path, change, message):
    ZooConfig.preset("gla-tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_every_mixer_is_reachable_from_a_config():
    for name in MIXERS:
        assert isinstance(ZooConfig(mixers={name: {}}).build_mixer(name), MIXERS[name])
