"""The matrix of every mixer times its values is what the mixer computes, and the matrix is that of its equation."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from lm_zoo.eval import implicit_attention
from lm_zoo.layers import MIXERS, Mixer
from lm_zoo.modules.norm import RMSNorm

D, T = 16, 11
LAYERS = {
    name: (name, {"num_heads": 2} if "num_heads" in inspect.signature(mixer).parameters else {})
    for name, mixer in MIXERS.items()
} | {
    "mamba2": ("mamba2", {"head_size": 8, "state_size": 4}),
    "mamba2-negative": ("mamba2", {"head_size": 8, "state_size": 4, "allow_negative_eigenvalues": True}),
    "attention-window": ("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 3}),
    "linear_attention-sum": ("linear_attention", {"num_heads": 2, "feature_map": "identity", "denominator": False}),
    "hgrn-complex": ("hgrn", {"complex": True}),
    "deltaproduct-3": ("deltaproduct", {"num_heads": 2, "num_householders": 3, "gated": True}),
    "deltanet-narrow": ("deltanet", {"num_heads": 4, "expand_v": 0.75}),
    "gated_deltanet-grouped": ("gated_deltanet", {"num_heads": 2, "num_value_heads": 4, "expand_v": 1.0}),
}
AVERAGES = ("attention", "attention-window", "linear_attention")  # whose rows add up to 1, but for an epsilon


def build(name: str) -> Mixer:
    mixer, options = LAYERS[name]
    torch.manual_seed(0)
    layer = MIXERS[mixer](D, **options).double()
    for parameter in layer.parameters():  # so that decays, gates and D differ from head to head
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_times_the_values_is_the_output(name, x):
    layer = build(name)
    y = layer(x)
    matrix, values, output = implicit_attention(layer, x)
    assert_close(torch.view_as_real(matrix @ values + 0j), torch.view_as_real(output + 0j), 1e-10)
    steps = getattr(layer, "num_householders", 1)
    assert matrix.shape[-2:] == (T, steps * T)
    later = matrix.unflatten(-1, (T, steps)).movedim(-1, 0).triu(1)
    assert later.abs().max() < 1e-14 * matrix.abs().max(), "a token saw a later one"  # S4D's FFT rounds
    if name in AVERAGES:
        assert_close(matrix.sum(dim=-1), torch.ones_like(matrix[..., 0]), 1e-5)
    assert torch.equal(layer(x), y), "looking at the layer changed it"


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_what_the_layer_goes_on_with(name, x):
    """Norm, gate and projection find the very numbers that `output` has."""
    layer = build(name)
    output = implicit_attention(layer, x).output.transpose(1, 2).flatten(2)
    expected = []
    norm = next((module for module in layer.modules() if isinstance(module, RMSNorm)), None)
    last = layer.out_proj if name == "mamba" else layer.o_proj if norm is None else norm
    last.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0].reshape(2, T, -1)))
    layer(x)
    if name == "mamba":
        output = output * F.silu(layer.in_proj(x).chunk(2, dim=-1)[1])
    elif name == "s4d":
        output = F.gelu(output)
    elif output.is_complex():
        output = torch.cat([output.real, output.imag], dim=-1)
    assert_close(output, expected[0], 1e-10)


def test_softmax_attention_gives_its_weights(x):
    layer = build("attention-window")
    matrix = implicit_attention(layer, x).matrix
    q, k = (p(x).unflatten(-1, (-1, layer.head_size)).double() for p in (layer.q_proj, layer.k_proj))
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, 1, 0.5, dtype=torch.float64))

    def turn(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    scores = torch.einsum("bthd,bshd->bhts", turn(q), turn(k).repeat_interleave(2, dim=2)) / math.sqrt(layer.head_size)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = scores.masked_fill((distance < 0) | (distance >= 3), -torch.inf)
    assert_close(matrix, scores.softmax(dim=-1), 1e-6)  # rotary angles are of float32


def test_gla_gives_scores_under_its_decays(x):
    layer = build("gla")
    matrix = implicit_attention(layer, x).matrix
    q, k, z = (p(x).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.decay_proj))
    G = (F.logsigmoid(z) / layer.gate_logit_normalizer).cumsum(dim=1)
    decay = (G[:, :, None] - G[:, None]).exp()  # [B, t, s, H, K]
    expected = torch.einsum("bthk,bshk,btshk->bhts", q, k, decay).tril() * layer.key_size**-0.5
    assert_close(matrix, expected, 1e-10)


def test_mamba_gives_the_hidden_attention_of_every_channel(x):
    """C_t exp(A sum dt) dt_s B_s, and D on the diagonal (Ali et al. 2024, equation 12)."""
    layer = build("mamba")
    matrix = implicit_attention(layer, x).matrix
    u = layer.conv(layer.in_proj(x).chunk(2, dim=-1)[0], None, None)
    r, B, C = layer.x_proj(u).split((layer.dt_rank, layer.state_size, layer.state_size), dim=-1)
    dt = F.softplus(layer.dt_proj(r))
    total = dt.cumsum(dim=1)
    decay = (-layer.A_log.exp() * (total[:, :, None] - total[:, None])[..., None]).exp()  # [B, t, s, channels, N]
    expected = torch.einsum("btn,bsn,btscn,bsc->bcts", C, B, decay, dt).tril() + torch.diag_embed(
        layer.D[:, None].expand(-1, T)
    )
    assert_close(matrix, expected, 1e-10)


def test_s4d_gives_one_convolution(x):
    matrix = implicit_attention(build("s4d"), x).matrix
    for offset in range(T):
        band = matrix.diagonal(-offset, dim1=-2, dim2=-1)
        assert_close(band, band[..., :1].expand_as(band), 1e-9)


def test_a_layer_that_does_not_say_where_it_mixes_is_refused(x):
    class Silent(Mixer):
        def forward(self, x, *, state=None, cu_seqlens=None):
            return x.cumsum(dim=1)

    with pytest.raises(ValueError, match=r"along_time; Silent called 0"):
        implicit_attention(Silent(), x)
    with pytest.raises(TypeError, match="layer must be a mixer"):
        implicit_attention(torch.nn.Linear(2, 2), x)
