"""The layers on vector scans against their papers' equations in float64 and against transformers' layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers.hgrn import HGRN
from lm_zoo.modules.lower_bounds import LowerBounds, bounded_gate

B, T, D = 2, 11, 24


def draw(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    return draw(B, T, D)


def rms_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def randomize(layer, seed=0):
    """Every parameter random, so that none hides behind an initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer


def gammas(logits):
    """The paper's lower bounds of all layers: cumulative softmax over the depth, less its first row."""
    P = torch.stack([row.exp() for row in logits])
    c = (P / P.sum(0)).cumsum(0)
    return c - c[0]


@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("index", [None, 0, 2])
def test_hgrn(x, index, complex):
    layer = randomize(HGRN(D, complex=complex, layer_index=index or 0, num_layers=3)).double()
    gamma = torch.zeros(D, dtype=torch.float64)
    if index is not None:
        bounds = randomize(layer.shared_over_depth(3)).double()
        layer.share(bounds)
        gamma = gammas(bounds.logits)[index]
    f = gamma + (1 - gamma) / (1 + (-(x @ layer.f_proj.weight.T)).exp())
    c = x @ layer.i_proj.weight.T
    c = c / (1 + (-c).exp())
    h = torch.zeros(B, c.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(T):
        if complex:  # turned by theta: real and imaginary parts as two halves
            real, imaginary = h.chunk(2, dim=-1)
            cos, sin = layer.theta.cos(), layer.theta.sin()
            h = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        keep, write = (y.repeat(1, 2 if complex else 1) for y in (f[:, t], 1 - f[:, t]))
        h = keep * h + write * c[:, t]
        outputs.append(h)
    y = rms_norm(torch.stack(outputs, dim=1), layer.norm.weight) * F.silu(x @ layer.gate_proj.weight.T)
    assert_close(layer(x), y @ layer.o_proj.weight.T, 1e-12)


def test_hgrn_phases_start_as_rotary_angles():
    layer = HGRN(8, complex=True)
    assert_close(layer.theta, torch.tensor([10000 ** (-2 * d / 8) for d in range(8)]), 1e-6)
    assert layer.init_state(2)["h"].dtype == torch.complex64
    assert HGRN(8).theta is None


def test_lower_bounds_rise_from_0_and_stay_below_1():
    bounds = randomize(LowerBounds(5, 8))
    rows = torch.stack([bounds(i) for i in range(5)])
    assert_close(rows, gammas(bounds.logits.double()), 1e-6)
    assert not rows[0].any()
    assert (rows.diff(dim=0) > 0).all()
    assert (rows < 1).all()
    fresh = LowerBounds(5, 8)
    assert_close(torch.stack([fresh(i) for i in range(5)])[:, 0], torch.arange(5) / 5, 1e-6)


@pytest.mark.parametrize("bound", [None, 0.0, 1e-30, 0.5, 1.0])
def test_gates_are_exact_at_their_ends(bound):
    z = torch.tensor([-300.0, -100.0, -20.0, 0.0, 20.0, 100.0, 300.0]).requires_grad_()
    gamma = None if bound is None else torch.full_like(z, bound).requires_grad_()
    log_f, write = bounded_gate(z, gamma)
    low, wide = torch.tensor(bound or 0.0, dtype=torch.float64), z.detach().double()
    expected = torch.logaddexp(low.log(), (1 - low).log() + F.logsigmoid(wide))
    if bound is None:
        torch.testing.assert_close(log_f.double(), expected, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(log_f.exp().double(), expected.exp(), rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(write.double(), (1 - low) * torch.sigmoid(-wide), rtol=1e-5, atol=1e-37)
    (log_f.sum() + write.sum()).backward()
    assert torch.isfinite(z.grad).all()
    assert gamma is None or torch.isfinite(gamma.grad).all()


@pytest.fixture
def bounded_model():
    config = ZooConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=4, pattern=["hgrn2", "gla", "other"],
        mixers={"hgrn2": {"num_heads": 2}, "other": {"type": "hgrn"}, "gla": {}},
    )  # fmt: skip
    model = ZooForCausalLM(config).double().eval()
    randomize(model.model.shared, seed=5)
    return model


def test_a_model_owns_the_bounds_of_each_kind_of_layer(bounded_model, tmp_path):
    ids = torch.arange(10)[None]
    expected = bounded_model(ids).logits
    names = [name for name in bounded_model.state_dict() if "logits" in name]
    assert names == ["model.shared.0.logits", "model.shared.1.logits"]  # hgrn2 and other, once each
    bounded_model.save_pretrained(tmp_path)
    loaded = ZooForCausalLM.from_pretrained(tmp_path)
    with torch.device("meta"):
        empty = ZooForCausalLM(bounded_model.config)
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(bounded_model.state_dict())
    copied = copy.deepcopy(bounded_model)
    for model in (loaded, empty.eval(), copied):
        shared = model.model.shared
        owners = [block.mixer.shared for block in model.model.layers]
        assert [owner and list(shared).index(owner) for owner in owners] == [0, None, 1, 0]
        assert shared[0] is not bounded_model.model.shared[0]
        assert_close(model(ids).logits, expected, 1e-12)
    copied(ids).logits.square().sum().backward()
    assert all(bounds.logits.grad.any() for bounds in copied.model.shared)
    assert all(bounds.logits.grad is None for bounds in bounded_model.model.shared)
    empty.init_weights()
    assert not any(bounds.logits.any() for bounds in empty.model.shared)


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        (HGRN, {"complex": 1}, TypeError, "complex must be True or False, got 1"),
        (HGRN, {"layer_index": -1}, ValueError, r"layer_index must be in \[0, num_layers = 1\), got -1"),
        (HGRN, {"norm_eps": -1.0}, ValueError, "norm_eps must be positive"),
    ],
)
def test_impossible_options_are_rejected_at_once(mixer, options, error, message):
    with pytest.raises(error, match=message):
        mixer(D, **options)
