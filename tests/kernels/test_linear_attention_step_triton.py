"""The decode kernel against the recurrence in float64: every decay and update, odd sizes, one token and several."""

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import backends, linear_attention, linear_attention_step
from lm_zoo.kernels.linear_attention import triton_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = ["none", "constant", "token", "channel"]


def make(decay, delta, *, T=3, B=2, H=2, HV=4, K=16, V=24, seed=0):
    """Float64 arguments of a step over T tokens whose values are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double().to(DEVICE)

    shape = {"none": None, "constant": (HV,), "token": (B, T, HV), "channel": (B, T, HV, K)}[decay]
    return {
        "q": draw(B, T, H, K),
        "k": torch.nn.functional.normalize(draw(B, T, H, K), dim=-1).float().double(),
        "v": draw(B, T, HV, V),
        "log_decay": None if shape is None else -draw(*shape).abs(),
        "beta": 2 * draw(B, T, HV).sigmoid().float().double() if delta else None,
        "state": draw(B, HV, K, V),
    }


def to(inputs, dtype):
    """Everything but the state in `dtype`; the state, a copy, in float32."""
    return {
        name: x if x is None else x.to(torch.float32 if name == "state" else dtype, copy=True)
        for name, x in inputs.items()
    }


def expected(inputs):
    x = {name: value for name, value in inputs.items() if name != "state"}
    return linear_attention(**x, initial_state=inputs["state"], output_final_state=True, backend="reference")


def step(inputs, backend):
    """The outputs, and the state that the step left at its address."""
    address = inputs["state"].data_ptr()
    with backends.use_backend(backend):
        o = linear_attention_step(**inputs)
    assert inputs["state"].data_ptr() == address
    return o, inputs["state"]


def check(inputs):
    wanted = expected(inputs)
    for name, actual, value in zip(("o", "state"), step(to(inputs, torch.float32), "triton"), wanted, strict=True):
        assert_close(actual, value, 1e-6, name)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_matches_recurrence(decay, delta):
    check(make(decay, delta))


@pytest.mark.parametrize(("K", "V"), [(20, 33), (64, 128), (256, 16), (17, 256)])
def test_odd_and_large_sizes(K, V):
    check(make("channel", True, T=2, B=1, H=1, HV=2, K=K, V=V))


def test_the_kernel_is_what_runs(monkeypatch):
    """Several programs share the columns of a state: the tests above would say nothing if torch took the call."""
    monkeypatch.setattr(triton_step, "STATE_TILE", 16 * 8)
    calls = []
    kernel = triton_step.step_kernel

    class Spy:
        def __getitem__(self, grid):
            calls.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_step, "step_kernel", Spy())
    check(make("token", True, T=2, V=24))
    assert calls == [(8, 3)]


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_one_token_without_a_time_dimension_and_any_split(decay, delta):
    inputs = make(decay, delta, T=5, K=8, V=8)
    whole, whole_state = step(to(inputs, torch.float32), "triton")
    parts = to(inputs, torch.float32)
    state, outputs = parts.pop("state"), []

    def cut(index):
        return {name: x if x is None or x.dim() == 1 else x[:, index] for name, x in parts.items()}

    outputs.append(step(cut(0) | {"state": state}, "triton")[0][:, None])
    outputs += [step(cut(slice(*at)) | {"state": state}, "triton")[0] for at in ((1, 2), (2, 5))]
    # Not to the bit: on a GPU a single token is a kernel of its own, whose sums may be fused in another way.
    assert_close(torch.cat(outputs, dim=1), whole, 1e-6)
    assert_close(state, whole_state, 1e-6)


def test_hard_resets_leave_no_nan():
    inputs = make("channel", True)
    inputs["log_decay"][:, 1] = -torch.inf
    check(inputs)


def test_alone_and_in_a_batch_bitwise_the_same():
    inputs = to(make("channel", True, B=3), torch.float32)
    row = {name: x[1:2].clone() for name, x in inputs.items()}
    for together, alone in zip(step(inputs, "triton"), step(row, "triton"), strict=True):
        assert torch.equal(together[1:2], alone)


def test_float16_rounds_the_output_only():
    inputs = to(make("channel", True), torch.float16)
    wanted, wanted_state = expected({name: x.double() for name, x in inputs.items()})
    o, state = step(inputs, "triton")
    assert o.dtype == torch.float16
    assert state.dtype == torch.float32
    assert_close(o, wanted, 1e-3)
    assert_close(state, wanted_state, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_views_of_larger_tensors(backend):
    """q and k as halves of one tensor, and a state with gaps between its heads, keys or values."""
    inputs = make("token", True, K=8, V=8)
    wanted, wanted_state = expected(inputs)
    x = to(inputs, torch.float32)
    x["q"], x["k"] = torch.cat([x["q"], x["k"]], dim=-1).chunk(2, dim=-1)
    for dim in (1, 2, 3):
        half = slice(4) if dim == 1 else slice(None, None, 2)  # the first heads: no view joins them with the batch
        gap = (slice(None),) * dim + (half,)
        wide = torch.full([2, 4, 8, 8], torch.nan, device=DEVICE).repeat_interleave(2, dim=dim)
        wide[gap] = inputs["state"].float()
        o, state = step(x | {"state": wide[gap]}, backend)
        assert_close(o, wanted, 1e-6)
        assert_close(state, wanted_state, 1e-6)
        assert wide.isnan().sum() == wide.numel() // 2


def test_a_float64_state_falls_to_torch():
    inputs = make("token", True)
    wanted, wanted_state = expected(inputs)
    backends._warned.clear()
    with pytest.warns(RuntimeWarning, match="falls back from Triton to PyTorch: .*float64"):
        o, state = step(inputs, "triton")
    assert_close(o, wanted, 1e-12)
    assert_close(state, wanted_state, 1e-12)


def test_no_tokens():
    inputs = to(make("token", False, T=0), torch.float32)
    before = inputs["state"].clone()
    o, state = step(inputs, "triton")
    assert o.shape == (2, 0, 4, 24)
    assert torch.equal(state, before)
