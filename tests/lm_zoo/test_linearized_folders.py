"""Linearized models on disk and in memory: folders that transformers loads, shared weights, and what is refused."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from plain_mixer import PlainAttention, plain_mixer
from safetensors.torch import load_file, save_file
from tiny_teachers import TEACHERS, VOCAB, new_teacher, teacher, teacher_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lm_zoo import LinearizedConfig, LinearizedForCausalLM
from lm_zoo.errors import UserError
from lm_zoo.linearized import FAMILIES, check_teacher, family_of

IDS = torch.arange(1, 13)[None]
SUPPORTED = ", ".join(sorted(FAMILIES))


@pytest.fixture(autouse=True, scope="module")
def _plain_mixer():
    with plain_mixer():
        yield


def student(name="llama", keep=(1,), **changes):
    base = new_teacher(name, **changes)
    torch.manual_seed(2)
    return LinearizedForCausalLM.from_teacher(base, "plain", {"decay": -0.2}, keep_layers=keep)


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
def test_a_folder_comes_back_as_it_went(name, tmp_path):
    model = student(name)
    for parameter in model.parameters():
        parameter += 0.01  # no longer as anything initialises it
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LinearizedForCausalLM
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.config.to_dict() == model.config.to_dict() | {
        "_name_or_path": str(tmp_path),
        "architectures": ["LinearizedForCausalLM"],
    }
    tied = model.teacher.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    again.save_pretrained(tmp_path / "second")
    (first, second) = ((path / "config.json").read_text() for path in (tmp_path, tmp_path / "second"))
    assert first == second


@torch.no_grad()
def test_a_folder_in_another_dtype(tmp_path):
    model = student().bfloat16()
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.state_dict()["teacher.lm_head.weight"], model.teacher.lm_head.weight.float())
    assert wide(IDS).logits.dtype == torch.float32


def test_a_folder_without_all_weights_is_refused(tmp_path):
    student("mistral-global").save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LinearizedForCausalLM)
    assert not info["missing_keys"]
    weights = load_file(tmp_path / "model.safetensors")
    mixer = "teacher.model.layers.0.self_attn.mixer."
    del weights[mixer + "decay"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{tmp_path} has no weight {mixer}decay: it was not saved whole"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del weights[mixer + "gate.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="decay and 1 more"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


REMOTE = """
import sys
from transformers import AutoModelForCausalLM
assert "lm_zoo" not in sys.modules
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import torch
print(model(torch.arange(1, 13)[None]).logits.double().sum().item())
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again.state_dict()["teacher.lm_head.weight"], model.state_dict()["teacher.lm_head.weight"])
assert len(model.generate(torch.arange(1, 13)[None], max_new_tokens=3)[0]) == 15
"""


def test_trust_remote_code_where_lm_zoo_is_only_installed(tmp_path):
    # In a process of its own, which knows no mixer of the tests.
    model = LinearizedForCausalLM.from_teacher(new_teacher("llama"), "gated_deltanet", {"conv_size": 2}, [1])
    model.save_pretrained(tmp_path / "out")
    folder = tmp_path / "out"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(model(IDS).logits.double().sum().item(), rel=1e-5)
    files = {file.name for file in folder.iterdir() if file.is_file()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "modeling_lm_zoo.py"}
    assert {file.name for file in (folder / "again").iterdir()} == files  # and none of the package's own modules
    assert (folder / "again" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-global"])
def test_weights_are_the_teachers_own(name):
    base = new_teacher(name)
    before = base(IDS).logits
    names = {id(parameter) for parameter in base.parameters()}
    model = LinearizedForCausalLM.from_teacher(base, "plain", keep_layers=[1])
    own = [key for key, parameter in model.named_parameters() if id(parameter) not in names]
    assert len(own) == 3 * 2  # decay and gate, in two layers
    assert all(".mixer." in key for key in own)
    assert sum(id(parameter) in names for parameter in model.parameters()) == len(names)
    assert not (model(IDS).logits - before).abs().max() < 0.05
    assert torch.equal(base(IDS).logits, before)  # side by side
    third = model.as_teacher()
    assert {id(parameter) for parameter in third.parameters()} == names
    assert type(third) is type(base)
    assert torch.equal(third(IDS).logits, before)
    assert not any("mixer" in key for key in third.state_dict())
    eager = model.as_teacher("eager")
    assert eager.config._attn_implementation == "eager"
    assert model.teacher.config._attn_implementation == "lm_zoo"
    assert base.config._attn_implementation == "sdpa"
    assert torch.allclose(eager(IDS).logits, before, atol=1e-5)
    with torch.no_grad():  # one weight is all three models' weight
        next(model.teacher.parameters()).mul_(2)
    assert torch.equal(base(IDS).logits, third(IDS).logits)
    assert not torch.equal(base(IDS).logits, before)


@torch.no_grad()
def test_a_student_can_be_copied_and_begun_again():
    model = student()
    copied = copy.deepcopy(model)
    expected = model(IDS).logits
    assert torch.equal(copied(IDS).logits, expected)
    next(copied.parameters()).zero_()
    assert torch.equal(model(IDS).logits, expected)
    again = LinearizedForCausalLM.from_teacher(model.as_teacher(), "plain", keep_layers=[0, 1, 2])
    assert torch.equal(again(IDS).logits, new_teacher("llama")(IDS).logits)
    assert torch.equal(model(IDS).logits, expected)


def test_bytes_of_a_model_that_is_not_there():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(teacher_config("llama"))
        model = LinearizedForCausalLM.from_teacher(base, "plain", keep_layers=[1])
        assert model.init_cache(2).nbytes == student().init_cache(2).nbytes
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_mixers_come_as_the_teacher_is():
    base = new_teacher("llama").train().bfloat16()
    model = LinearizedForCausalLM.from_teacher(base, "plain", keep_layers=[])
    assert model.training
    assert model.attention_layers[0].mixer.gate.weight.dtype == torch.bfloat16
    assert [module.mixer is None for module in student(keep=(0, 2)).attention_layers] == [True, False, True]
    torch.manual_seed(2)
    gate = PlainAttention(num_heads=4, num_kv_heads=2, head_size=6, scale=6**-0.5, hidden_size=32).gate
    assert torch.equal(student(keep=(1, 2)).attention_layers[0].mixer.gate.weight, gate.weight)  # as it made itself
    torch.manual_seed(2)
    fresh = LinearizedForCausalLM(student().config)
    assert (fresh.attention_layers[0].mixer.decay == torch.full((4,), -0.2)).all()


def test_generation_goes_as_the_teachers():
    base = new_teacher("llama")
    base.generation_config.eos_token_id = 7
    model = LinearizedForCausalLM.from_teacher(base, "plain")
    assert model.generation_config.eos_token_id == 7
    model.generation_config.eos_token_id = 8
    assert base.generation_config.eos_token_id == 7


def test_embeddings_can_be_resized():
    model = student("mistral-global")
    model.resize_token_embeddings(VOCAB + 3)
    assert model.config.vocab_size == model.config.teacher_config["vocab_size"] == VOCAB + 3
    assert model(IDS).logits.shape == (1, 12, VOCAB + 3)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_common_sizes_are_read_from_the_teacher():
    config = student("gpt2").config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 3, 64)
    assert isinstance(AutoConfig.for_model(**config.to_dict()), LinearizedConfig)


@pytest.mark.parametrize(
    "kind", ["bloom", "opt", "mixtral", "qwen3_moe", "gemma2", "t5", "mamba2", "falcon", "qwen2_vl"]
)
def test_other_families_are_refused_by_name(kind):
    config = AutoConfig.for_model(kind)
    with pytest.raises(UserError) as error:
        family_of(config)
    assert f"the teacher's family '{kind}' cannot be linearized" in str(error.value)
    assert SUPPORTED in str(error.value)


def tiny(kind, auto=AutoModelForCausalLM, **options):
    return auto.from_config(AutoConfig.for_model(kind, **options))


def test_models_that_are_no_teachers_are_refused():
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB}
    with pytest.raises(UserError, match=f"family 'bloom' cannot be linearized; supported: {SUPPORTED}"):
        LinearizedForCausalLM.from_teacher(tiny("bloom", **sizes), "plain")
    with pytest.raises(UserError, match=r"family 'gemma3' cannot be linearized; give its text model \(gemma3_text\)"):
        family_of(AutoConfig.for_model("gemma3"))
    with pytest.raises(
        UserError, match="must be a LlamaForCausalLM, got a LlamaModel: load it with AutoModelForCausalLM"
    ):
        check_teacher(AutoModel.from_config(teacher_config("llama")))
    with pytest.raises(UserError, match="must be a GPT2LMHeadModel, got a GPT2ForSequenceClassification"):
        check_teacher(AutoModelForSequenceClassification.from_config(teacher_config("gpt2")))
    with pytest.raises(UserError, match="it has cross attention"):
        LinearizedForCausalLM.from_teacher(new_teacher("gpt2", add_cross_attention=True), "plain")
    with pytest.raises(UserError, match="its attention looks ahead"):
        family_of(teacher_config("gemma3", use_bidirectional_attention=True))
    with pytest.raises(UserError, match="quantized: load it without quantization_config"):
        family_of(teacher_config("llama", quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(UserError, match="must be a causal language model of transformers, got str"):
        check_teacher("llama")
    with pytest.raises(UserError, match="family 'lm_zoo_linearized' cannot be linearized"):
        check_teacher(student())
    with pytest.raises(UserError, match=r"give the as_teacher\(\) of that one"):
        check_teacher(student().teacher)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "mixer must be an inner mixer of lm_zoo, got 'plane'.*did you mean 'plain'", {"mixer": "plane"}),
        (ValueError, "mixer must be an inner mixer of lm_zoo, got None", {"mixer": None}),
        (ValueError, "unknown option 'decays' for the mixer 'plain'.*'decay'", {"mixer_options": {"decays": 1}}),
        (ValueError, "mixer_options must not have 'scale'", {"mixer_options": {"scale": 1.0}}),
        (TypeError, "mixer_options must hold keyword arguments", {"mixer_options": [1]}),
        (ValueError, r"keep_layers must be in \[0, 3\), the teacher's layers, got 3", {"keep_layers": [1, 3]}),
        (TypeError, "keep_layers must hold integers, got True", {"keep_layers": [True]}),
        (TypeError, "teacher_config must be a teacher's config", {"teacher_config": {"vocab_size": 3}}),
        (ValueError, "teacher_config: .*nonesuch", {"teacher_config": {"model_type": "nonesuch"}}),
        (UserError, "family 'opt' cannot be linearized", {"teacher_config": {"model_type": "opt"}}),
        (ValueError, "unknown option 'keep_layer' for LinearizedConfig.*'keep_layers'", {"keep_layer": [1]}),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(error, message, changes):
    options = {"teacher_config": teacher_config("llama").to_dict(), "mixer": "plain", "keep_layers": [2, 0, 0]}
    assert LinearizedConfig(**options).keep_layers == [0, 2]
    with pytest.raises(error, match=message):
        LinearizedConfig(**options | changes)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="mixer 'plain': decay must not be above 0, got 1"):
        LinearizedForCausalLM.from_teacher(teacher("llama"), "plain", {"decay": 1.0})
    model = student()
    with pytest.raises(ValueError, match="call that one, or its as_teacher"):
        model.teacher(IDS)
    with pytest.raises(ValueError, match=r"see as_teacher\(attn_implementation\)"):
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions is not supported by LinearizedForCausalLM"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="past_key_values has 4 layers, but the model has 2"):
        LinearizedForCausalLM.from_teacher(new_teacher("llama", num_hidden_layers=1), "plain")(
            IDS, past_key_values=model.init_cache(1)
        )
