"""The layers on vector scans against their papers' equations in float64 and against transformers' layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from transformers import DynamicCache, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.layers.hgrn import HGRN
from lm_zoo.layers.mamba import Mamba
from lm_zoo.layers.s4d import S4D
from lm_zoo.modules.lower_bounds import LowerBounds, bounded_gate
from lm_zoo.train.optim import parameter_groups

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


def test_no_gate_grows():
    generator = torch.Generator().manual_seed(0)
    z = 10 * torch.randn(100_000, generator=generator)
    gamma = torch.rand(100_000, generator=generator)
    log_f, _ = bounded_gate(z, gamma)
    assert log_f.max() <= 0
    exact = torch.log1p(-(1 - gamma.double()) * torch.sigmoid(-z.double()))
    torch.testing.assert_close(log_f.double(), exact, rtol=1e-5, atol=0)  # also of the smallest decays


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


def test_mamba(x):
    layer = randomize(Mamba(D, state_size=3, dt_rank=5, conv_size=3)).double()
    u, z = (x @ layer.in_proj.weight.T).chunk(2, dim=-1)
    past = F.pad(u, (0, 0, 2, 0))
    u = F.silu(sum(past[:, w : w + T] * layer.conv.weight[:, w] for w in range(3)) + layer.conv.bias)
    r, write, read = (u @ layer.x_proj.weight.T).split((5, 3, 3), dim=-1)
    dt = (1 + (r @ layer.dt_proj.weight.T + layer.dt_proj.bias).exp()).log()
    h = torch.zeros(B, 2 * D, 3, dtype=torch.float64)
    outputs = []
    for t in range(T):
        h = (dt[:, t, :, None] * -layer.A_log.exp()).exp() * h + torch.einsum(
            "bd,bd,bn->bdn", dt[:, t], u[:, t], write[:, t]
        )
        y = torch.einsum("bdn,bn->bd", h, read[:, t]) + layer.D * u[:, t]
        outputs.append((y * F.silu(z[:, t])) @ layer.out_proj.weight.T)
    assert_close(layer(x), torch.stack(outputs, dim=1), 1e-12)


def mamba_weights(theirs):
    """transformers' names in ours; the convolution has one dimension less."""
    renamed = {
        "backbone.embeddings.": "model.embed_tokens.", "backbone.layers.": "model.layers.", ".norm.": ".mixer_norm.",
        "backbone.norm_f.": "model.norm.", "conv1d.": "conv.",
    }  # fmt: skip
    weights = {}
    for name, tensor in theirs.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = tensor.squeeze(1) if name.endswith("conv.weight") else tensor
    return weights


def test_mamba_equals_that_of_transformers():
    """The layer in float64: outputs, gradients and both states."""
    config = MambaConfig(hidden_size=D, state_size=5, num_hidden_layers=1, use_mambapy=False)
    theirs = randomize(MambaMixer(config, layer_idx=0)).double()
    layer = Mamba(D, state_size=5).double()
    layer.load_state_dict(mamba_weights(theirs.state_dict()))
    x = draw(B, T, D).requires_grad_()
    cache = DynamicCache(config=config)
    expected = theirs(x, cache)
    state = layer.init_state(B)
    y = layer(x, state=state)
    assert_close(y, expected, 1e-6)  # theirs take A, D and the bias in float32
    assert_close(state["h"], cache.get_recurrent_state(0, state_idx=0), 1e-6)
    assert_close(state["conv"], cache.get_conv_state(0, state_idx=0)[..., -3:], 1e-12)
    grads = torch.autograd.grad(y.square().sum(), [x, layer.A_log, layer.x_proj.weight])
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, theirs.A_log, theirs.x_proj.weight])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, 1e-5)


def test_a_mamba_model_equals_that_of_transformers():
    """Random weights copied over: logits, loss and greedy text, in float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 3}
    theirs = MambaForCausalLM(MambaConfig(**sizes, state_size=8, use_mambapy=False, pad_token_id=0)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = ZooConfig(
        **sizes, intermediate_size=0, mixers={"mamba": {"state_size": 8}}, norm_eps=1e-5, tie_word_embeddings=True
    )
    ours = ZooForCausalLM(config).eval()
    ours.load_state_dict(mamba_weights(theirs.state_dict()))
    assert ours.num_parameters() == theirs.num_parameters()
    ids = torch.randint(1, 53, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
        cache = ours.init_cache(2)
        steps = [ours(part, past_key_values=cache).logits for part in ids.split([30, *[1] * 10], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert_close(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss, 1e-5)


def test_mamba_starts_as_in_the_paper():
    layer = Mamba(64)
    assert layer.dt_rank == 4
    assert layer.init_state(1)["h"].shape == (1, 128, 16)
    assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-6)
    config = ZooConfig(vocab_size=7, hidden_size=64, num_hidden_layers=1, mixers={"mamba": {}}, intermediate_size=0)
    with torch.device("meta"):
        model = ZooForCausalLM(config)
    model.to_empty(device="cpu").init_weights()
    for mixer in (layer, model.model.layers[0].mixer):
        dt = F.softplus(mixer.dt_proj.bias)
        assert 0.00099 < dt.min() < 0.003 < 0.03 < dt.max() < 0.101
        assert (mixer.D == 1).all()
        assert 0.4 < mixer.dt_proj.weight.abs().max() <= 0.5


def test_weight_decay_leaves_decays_bounds_and_phases_alone():
    mixers = {"lightning": {"num_heads": 2}, "hgrn": {"complex": True}, "s4d": {}, "mamba": {}}
    model = ZooForCausalLM(ZooConfig(vocab_size=7, hidden_size=16, num_hidden_layers=4, mixers=mixers))
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {"weight", "C"}
    assert {"model.layers.0.mixer.q_proj.weight", "model.layers.3.mixer.conv.weight"} <= names


def test_missing_weights_leave_the_loaded_ones_alone(tmp_path):
    """A checkpoint without A_log: the layer's own initial value, beside a loaded D, dt_proj and theta."""
    mixers = {"mamba": {}, "hgrn": {"complex": True}}
    model = ZooForCausalLM(ZooConfig(vocab_size=7, hidden_size=16, num_hidden_layers=2, mixers=mixers))
    randomize(model)
    left_out = ("model.layers.0.mixer.A_log", "model.layers.1.mixer.norm.weight")
    model.save_pretrained(
        tmp_path, state_dict={name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    )
    again = ZooForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor) == (name not in left_out), name
    assert_close(again[left_out[0]].exp(), torch.arange(1.0, 17).expand(32, 16), 1e-6)


def s4d_plainly(layer, x, h=None):
    """All N states, the conjugates too, token by token; returns outputs and the last states."""
    A = torch.complex(-layer.A_log.exp(), layer.A_imaginary)
    C = torch.complex(*layer.C.unbind(-1))
    A, C = torch.cat([A, A.conj()], dim=-1), torch.cat([C, C.conj()], dim=-1)
    dt = layer.log_dt.exp()[:, None]
    decay, write = (dt * A).exp(), ((dt * A).exp() - 1) / A
    h = torch.zeros(len(x), *A.shape, dtype=A.dtype) if h is None else h
    outputs = []
    for t in range(x.shape[1]):
        h = decay * h + write * x[:, t, :, None]
        s = (C * h).sum(-1)
        assert s.imag.abs().max() < 1e-12
        u, w = layer.o_proj(F.gelu(s.real + layer.D * x[:, t])).chunk(2, dim=-1)
        outputs.append(u / (1 + (-w).exp()))
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize("initialization", ["lin", "real"])
def test_s4d_by_convolution_and_by_blocks(initialization):
    """Several blocks: whole, packed with ragged and empty documents, in calls that go on; outputs and gradients."""
    layer = S4D(6, state_size=8, initialization=initialization).double()
    torch.nn.init.normal_(layer.log_dt, -3.0, generator=torch.Generator().manual_seed(0))
    x = draw(2, 333, 6).requires_grad_()
    expected, last = s4d_plainly(layer, x)
    weight = draw(2, 333, 6, seed=7)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad((expected * weight).sum(), wanted, retain_graph=True)
    whole = layer(x)
    state = layer.init_state(2)
    parts = torch.cat([layer(part, state=state) for part in x.split([1, 63, 64, 65, 128, 2, 10], dim=1)], dim=1)
    for y in (whole, parts):
        assert_close(y, expected, 1e-11)
        for grad, plain in zip(torch.autograd.grad((y * weight).sum(), wanted), grads, strict=True):
            assert_close(grad, plain, 1e-9, "gradient")
    assert_close(torch.view_as_real(state["h"]), torch.view_as_real(last[..., :4]), 1e-11, "state")

    sizes = [0, 64, 1, 0, 128, 63, 77, 0]
    starts = torch.complex(draw(8, 6, 4, seed=4), draw(8, 6, 4, seed=5))
    state = layer.init_state(8)
    state.write("h", starts)
    packed = layer(x[:1], state=state, cu_seqlens=F.pad(torch.tensor(sizes).cumsum(0), (1, 0)))
    for n, (y, part) in enumerate(zip(packed[0].split(sizes), x[0].split(sizes), strict=True)):
        h = torch.cat([starts[n : n + 1], starts[n : n + 1].conj()], dim=-1)
        if sizes[n]:
            alone, h = s4d_plainly(layer, part[None], h)
            assert_close(y, alone[0], 1e-11, f"document {n}")
        assert_close(torch.view_as_real(state["h"][n]), torch.view_as_real(h[0, :, :4]), 1e-11, f"state {n}")


def test_s4d_starts_as_in_the_paper():
    lin, real = S4D(8), S4D(8, initialization="real")
    n = torch.arange(32.0)
    for layer, A in ((lin, torch.complex(torch.full((32,), -0.5), torch.pi * n)), (real, torch.complex(-n - 1, 0 * n))):
        a, b, _ = layer.discrete(torch.complex64)
        dt = layer.log_dt.exp()[:, None]
        assert_close(torch.view_as_real(a), torch.view_as_real(dt * A), 1e-6)
        assert_close(torch.view_as_real(b), torch.view_as_real(((dt * A).exp() - 1) / A), 1e-4)
        assert 0.001 <= dt.min() < dt.max() <= 0.1


def test_s4d_in_float32_over_4096_tokens():
    layer = S4D(4)
    exact = copy.deepcopy(layer).double()
    x = draw(1, 4096, 4, dtype=torch.float32)
    with torch.no_grad():
        expected = s4d_plainly(exact, x.double())[0]
        state = layer.init_state(1)
        assert_close(layer(x), expected, 1e-5, "convolution")
        assert_close(layer(x, state=state), expected, 1e-5, "blocks")
        state = layer.init_state(1)
        steps = torch.cat([layer(x[:, t : t + 1], state=state) for t in range(1024)], dim=1)
        assert_close(steps, expected[:, :1024], 1e-5, "steps")


@pytest.mark.parametrize(
    ("mixer", "options", "error", "message"),
    [
        (S4D, {"state_size": 7}, ValueError, "state_size must be even"),
        (S4D, {"initialization": "legs"}, ValueError, "initialization must be one of 'lin', 'real', got 'legs'"),
        (Mamba, {"expand": 1.3}, ValueError, "expand = 1.3 makes hidden_size = 24 to 31.2 channels"),
        (Mamba, {"expand": 0}, ValueError, "expand must be positive"),
        (Mamba, {"state_size": 0}, ValueError, "state_size must be at least 1"),
        (Mamba, {"dt_rank": "auto"}, TypeError, "dt_rank must be an integer, got 'auto'"),
        (Mamba, {"conv_size": 0}, ValueError, "conv_size must be at least 1"),
        (HGRN, {"complex": 1}, TypeError, "complex must be True or False, got 1"),
        (HGRN, {"layer_index": -1}, ValueError, r"layer_index must be in \[0, num_layers = 1\), got -1"),
        (HGRN, {"norm_eps": -1.0}, ValueError, "norm_eps must be positive"),
    ],
)
def test_impossible_options_are_rejected_at_once(mixer, options, error, message):
    with pytest.raises(error, match=message):
        mixer(D, **options)
