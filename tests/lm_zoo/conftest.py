"""Small layers and models that the tests of this folder share."""

import inspect

import pytest
import torch

from lm_zoo import MIXERS, ZooConfig, ZooForCausalLM

HIDDEN = 32
VOCAB = 61

# Every mixer at its defaults, and the variants that take other paths. A new mixer is covered by being registered.
SMALL = {
    name: {"num_heads": 4} if "num_heads" in inspect.signature(mixer).parameters else {}
    for name, mixer in MIXERS.items()
} | {"mamba2": {"head_size": 16, "state_size": 12}}
LAYERS = {name: (name, SMALL[name]) for name in MIXERS} | {
    "attention-grouped": ("attention", {"num_heads": 4, "num_kv_heads": 2, "head_size": 6}),
    "s4d-real": ("s4d", {"initialization": "real", "state_size": 6}),
    "hgrn-complex": ("hgrn", {"complex": True}),
    "lightning-deep": ("lightning", {"num_heads": 4, "layer_index": 2, "num_layers": 3, "gate": "sigmoid"}),
    "linear_attention-taylor": ("linear_attention", {"num_heads": 2, "feature_map": "taylor", "head_size": 4}),
    "linear_attention-hedgehog": ("linear_attention", {"num_heads": 4, "feature_map": "hedgehog"}),
    "linear_attention-t2r": ("linear_attention", {"num_heads": 4, "feature_map": "t2r"}),
    "linear_attention-identity": (
        "linear_attention",
        {"num_heads": 4, "feature_map": "identity", "denominator": False},
    ),
    "deltanet-negative": ("deltanet", {"num_heads": 2, "allow_negative_eigenvalues": True, "use_gate": True}),
    "deltaproduct-gated": ("deltaproduct", {"num_heads": 2, "num_householders": 3, "gated": True, "expand_v": 1.5}),
    "gated_deltanet-grouped": ("gated_deltanet", {"num_heads": 2, "num_value_heads": 4, "expand_v": 1.0}),
    "mamba2-negative": (
        "mamba2",
        {"head_size": 8, "state_size": 6, "num_groups": 2, "allow_negative_eigenvalues": True},
    ),
    "attention-window": ("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 6}),
}
PATTERNS = {name: {"mixers": {name: SMALL[name]}, "pattern": [name]} for name in MIXERS} | {
    "hybrid": {
        "mixers": {
            "gla": {"num_heads": 2},
            "local": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "window": 5},
            "attention": {"num_heads": 4},
        },
        "pattern": ["gla", "local", "attention"],
    }
}


def make_layer(name: str, dtype: torch.dtype = torch.float64):
    mixer, options = LAYERS[name]
    torch.manual_seed(0)
    return MIXERS[mixer](HIDDEN, **options).to(dtype)


def make_model(name: str, dtype: torch.dtype = torch.float64, **options) -> ZooForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "initializer_range": 0.3}
    model = ZooForCausalLM(ZooConfig(**sizes | PATTERNS[name] | options)).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [0]  # or generate() would take a 0 that it wrote for padding
    return model


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return make_layer(request.param)


@pytest.fixture(params=list(PATTERNS))
def model(request):
    return make_model(request.param)


@pytest.fixture(name="make_layer")
def make_layer_fixture():
    return make_layer


@pytest.fixture(name="make_model")
def make_model_fixture():
    return make_model


@pytest.fixture
def inputs():
    """Activations `[B, T, D]` by a fixed seed."""

    def draw(batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float64):
        return torch.randn(batch, length, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def tokens():
    """Token ids `[B, T]` by a fixed seed, none of them 0."""

    def draw(batch: int, length: int, seed: int = 1):
        return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def served(make_model):
    """A model of the bytes' vocabulary, in float64."""

    def make(name: str = "gla", **options):
        model = make_model(name, vocab_size=258, **options)
        model.generation_config.suppress_tokens = None
        return model

    return make
