"""Mixers of the registry between a teacher's projections: which there are, how they start, and what they make of it."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from inner_mixers import HIDDEN, SCALE, D, Texts, call
from tiny_teachers import new_teacher
from transformers import AutoModelForCausalLM

from lm_zoo import LinearizedForCausalLM
from lm_zoo.layers import MIXERS, DeltaNet, GatedDeltaNet, Mamba2
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.linearized import INNER_MIXERS, LinearizedConfig, RegisteredMixer, softmax
from lm_zoo.linearized.registered import register

REGISTERED = [name for name, kind in INNER_MIXERS.items() if issubclass(kind, RegisteredMixer)]
CONVOLVED = ["deltanet", "gated_deltanet", "deltaproduct", "kda", "mamba2"]
IDS = torch.arange(1, 13)[None]


@pytest.fixture(params=REGISTERED)
def name(request):
    return request.param


def fresh(name, heads=(4, 2), **options):
    torch.manual_seed(0)
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_size": D, "scale": SCALE, "hidden_size": HIDDEN}
    return INNER_MIXERS[name](**sizes, **options).double()


def test_every_layer_with_queries_keys_and_values_is_there():
    assert set(REGISTERED) == {name for name, layer in MIXERS.items() if issubclass(layer, QKVMixer)}
    assert {"gated_deltanet", "mamba2", "gla", "retnet", "linear_attention"} < set(REGISTERED)
    for name in CONVOLVED:
        assert {"silu", "conv_size"} < set(INNER_MIXERS[name].options())
    for name in REGISTERED:
        layer = INNER_MIXERS[name].layer_class
        decided = {*layer.sizes(1, 1, 1), "hidden_size", "layer_index", "num_layers"}
        assert not decided & set(INNER_MIXERS[name].options())


def test_it_has_no_projections_and_uses_all_parameters(name):
    """Of q, k, v and the output there are the teacher's; the layer's other parameters are there at their sizes."""
    mixer, texts = fresh(name), Texts(2, 9)
    kind = mixer.layer_class
    whole = kind(HIDDEN, **kind.sizes(HIDDEN, 4, D))
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj"}
    kept = {key: value.shape for key, value in whole.named_parameters() if key.split(".")[0] not in projections}
    found = {key: value.shape for key, value in mixer.layer.named_parameters()}
    new = {key for key in found if key.startswith(("gate_proj", "dt_proj"))}
    assert {key: found[key] for key in kept} == kept
    assert found.keys() - kept.keys() <= new
    for parameter in mixer.parameters():  # from zero weights of a gate nothing would flow on
        torch.nn.init.normal_(parameter)
    call(mixer, texts[:]).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "deltaproduct", "kda"])
def test_the_delta_rule_starts_with_the_teachers_own_vectors(name):
    """The first token reads back its own value, up to its sign and norm: nothing mixes it with another channel."""
    y, texts = call(fresh(name), Texts(2, 1)[:]), Texts(2, 1)
    cosine = F.cosine_similarity(y, texts.v.repeat_interleave(2, dim=2), dim=-1).abs()
    assert_close(cosine, torch.ones_like(cosine), 1e-3)


@pytest.mark.parametrize("name", CONVOLVED)
def test_convolution_and_gate_start_open(name):
    mixer, texts = fresh(name), Texts(1, 7)
    x = torch.randn(1, 7, mixer.layer.conv.channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mixer.layer.conv(x), x)
    assert_close(fresh(name, silu=True).layer.conv(x), F.silu(x), 1e-12)
    if name == "mamba2":
        assert not mixer.layer.D.any()
    if getattr(mixer.layer, "gate_proj", None) is not None:
        gates = mixer.layer.gate_proj(texts.hidden)
        assert torch.equal(gates, torch.ones_like(gates))


def test_norms_are_matched_per_head(name):
    mixer, texts = fresh(name), Texts(2, 9)
    wanted = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)

    def norms():
        return call(mixer, texts[:]).square().sum(dim=(0, 1, 3)).sqrt()

    mixer.match_norm(wanted / norms())
    assert_close(norms(), wanted, 1e-12)


@pytest.mark.parametrize("options", [{"rotary": True}, {"rotary": False}], ids=["turned", "turned back"])
def test_the_rotary_embedding_is_taken_off_or_left(options):
    mixer, texts = fresh("gated_deltanet", **options), Texts(2, 9)
    shifted = Texts(2, 9)
    turn = torch.polar(torch.ones(9, 2, dtype=torch.float64), torch.arange(9.0)[:, None].double().expand(9, 2))
    shifted.turn = shifted.turn * turn
    shifted.q, shifted.k = shifted.rotate(shifted.plain_q), shifted.rotate(shifted.plain_k)
    shifted.rotary = shifted.turn.real.repeat(1, 1, 2), shifted.turn.imag.repeat(1, 1, 2)
    difference = (call(mixer, texts[:]) - call(mixer, shifted[:])).abs().max()
    assert (difference > 1e-3) == options["rotary"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2"])
def test_a_folder_comes_back_as_it_went(name, tmp_path):
    base = new_teacher("qwen3")  # whose heads are wider, all together, than the model
    model = LinearizedForCausalLM.from_teacher(base, name, {"conv_size": 3}, keep_layers=[1])
    assert model.attention_layers[0].mixer.layer.hidden_size == 32
    for parameter in model.parameters():
        parameter += 0.01
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.mixer_options == {"conv_size": 3}


@torch.no_grad()
def test_the_teachers_outputs_are_there_to_match(name):
    """Norm-matched on a text, an untrained student's heads are as long as the teacher's, in every layer."""
    model = LinearizedForCausalLM.from_teacher(new_teacher("llama"), name)
    lengths = {}

    def matched(module, q, k, v, context):
        target = softmax(module, q, k, v, context)
        y = [module.mixer(q, k, v, context=context, state=None, cu_seqlens=None)]
        module.mixer.match_norm(target.square().sum(dim=(0, 1, 3)).sqrt() / y[0].square().sum(dim=(0, 1, 3)).sqrt())
        y.append(module.mixer(q, k, v, context=context, state=None, cu_seqlens=None))
        lengths[module.layer_idx] = [x.square().sum(dim=(0, 1, 3)) for x in (y[1], target)]
        return target

    with model.observed(matched):
        model(IDS)
    for found, expected in lengths.values():
        assert_close(found, expected, 1e-5)


def test_parameters_wider_than_the_teacher_compute_in_their_own_precision():
    """As in training a teacher of 16 bits."""
    mixer, texts = fresh("gated_deltanet").float(), Texts(2, 9, dtype=torch.bfloat16)
    y = call(mixer, texts[:])
    assert y.dtype == torch.bfloat16
    exact = mixer.double()
    for key in ("q", "k", "v", "hidden"):
        setattr(texts, key, getattr(texts, key).double())
    assert_close(y, call(exact, texts[:]), 3e-3)  # bfloat16's own rounding of y: half of 2^-8


def test_a_layer_of_ones_own_can_be_registered():
    class Mine(DeltaNet):
        pass

    register("mine", Mine)
    try:
        config = LinearizedConfig(
            teacher_config=new_teacher("llama").config.to_dict(), mixer="mine", mixer_options={"conv_size": 2}
        )
        assert type(LinearizedForCausalLM(config).attention_layers[0].mixer.layer) is Mine
    finally:
        del INNER_MIXERS["mine"]


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        ("mamba2", {"head_size": 8}, ValueError, "'head_size'"),
        ("mamba2", {"state_size": 8}, ValueError, "unknown option 'state_size' for the mixer 'mamba2'"),
        ("gated_deltanet", {"expand_v": 2.0}, ValueError, "unknown option 'expand_v'"),
        ("gated_deltanet", {"conv_sizes": 4}, ValueError, "did you mean 'conv_size'"),
        ("gla", {"silu": True}, ValueError, "unknown option 'silu' for the mixer 'gla'"),
        ("hgrn", {}, ValueError, "mixer must be an inner mixer of lm_zoo, got 'hgrn'"),
    ],
)
def test_what_the_teacher_decides_is_no_option(mixer, options, error, message):
    with pytest.raises(error, match=message):
        LinearizedConfig(teacher_config=new_teacher("llama").config.to_dict(), mixer=mixer, mixer_options=options)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match="rotary must be True or False, got 1"):
        fresh("gla", rotary=1)
    with pytest.raises(ValueError, match="silu must be false: this mixer has no convolution"):
        fresh("gla", silu=True)
    with pytest.raises(ValueError, match="mixer 'gated_deltanet': conv_size must be at least 1, got 0"):
        LinearizedForCausalLM.from_teacher(new_teacher("llama"), "gated_deltanet", {"conv_size": 0})


@pytest.mark.parametrize("layer", [GatedDeltaNet, Mamba2, MIXERS["gla"], MIXERS["lightning"]])
def test_heads_of_any_size_beside_any_hidden_size(layer):
    """Widths are whole numbers, though a fraction times the hidden size is one only but for its rounding."""
    hidden_size, width = 25, 14
    assert hidden_size * (width / hidden_size) != width
    mixer = layer.between_projections(hidden_size, 1, width)
    keys = 2 * width if layer is MIXERS["lightning"] else width  # its learned positions double them
    assert mixer.init_state(1)["S"].shape[1:] == (1, keys, width)
