"""The Triton kernels on a GPU at the sizes that models have: precision, and the same bits every time.

The tests beside this one run the kernels at tiny sizes, in Triton's interpreter or on a GPU; these need a GPU.
"""

import pytest
import torch
from compare import assert_close

from lm_zoo.kernels import linear_attention, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of outputs and of gradients, relative to the float64 recurrence.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (5e-3, 1e-2), torch.bfloat16: (5e-3, 1e-2)}
DECAYS = ["none", "constant", "scalar", "channel"]


def make_inputs(decay, delta, dtype, *, B=2, T=333, H=2, HV=4, K=64, V=64):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator, device="cuda").to(to)

    shape = {"none": None, "constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}[decay]
    return {
        "q": draw(B, T, H, K),
        "k": torch.nn.functional.normalize(draw(B, T, H, K).float(), dim=-1).to(dtype),
        "v": draw(B, T, HV, V),
        "log_decay": None if shape is None else -draw(*shape, to=torch.float32).abs() / 8,
        "beta": draw(B, T, HV).sigmoid() if delta else None,
        "initial_state": draw(B, HV, K, V, to=torch.float32),
    }


def run(inputs, backend, dtype=None):
    """Outputs, final state and gradients, of the op as it stands or of its inputs in `dtype`."""
    leaves = {
        name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()
    }
    o, state = linear_attention(**leaves, output_final_state=True, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype)).double().sum() for x in (o, state)
    )
    loss.backward()
    return {"o": o, "final state": state} | {f"d{name}": x.grad for name, x in leaves.items() if x is not None}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 256), (80, 48)])
def test_matches_recurrence(K, V, decay, delta, dtype):
    inputs = make_inputs(decay, delta, dtype, K=K, V=V)
    expected = run(inputs, "reference", torch.float64)
    for name, value in run(inputs, "triton").items():
        assert_close(value, expected[name], TOLERANCES[dtype][name.startswith("d")], name)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_the_same_bits_every_time(decay, delta):
    inputs = make_inputs(decay, delta, torch.bfloat16, T=2048, HV=8, K=128, V=128)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_does_not_see_its_batch(decay, delta):
    inputs = make_inputs(decay, delta, torch.bfloat16, B=7, T=1000)
    shared = {"log_decay"} if decay == "constant" else set()  # by the whole batch
    row = {name: x if x is None or name in shared else x[3:4] for name, x in inputs.items()}
    together = linear_attention(**inputs, output_final_state=True, backend="triton")
    alone = linear_attention(**row, output_final_state=True, backend="triton")
    for value, expected in zip(alone, together, strict=True):
        assert torch.equal(value, expected[3:4])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_selective_scan_matches_recurrence(dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    B, T, D, N = 2, 1500, 96, 16
    inputs = [
        draw(B, T, D),
        draw(B, T, D).abs() / 8,
        -draw(D, N).abs(),
        draw(B, T, N),
        draw(B, T, N),
        draw(D),
        draw(B, T, D),
    ]

    def gradients(backend, to):
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        y = selective_scan(*leaves, backend=backend)[0]
        weight = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y.dtype)
        return y, *torch.autograd.grad(y, leaves, weight)

    for i, (actual, expected) in enumerate(
        zip(gradients("triton", dtype), gradients("reference", torch.float64), strict=True)
    ):
        assert_close(actual, expected, TOLERANCES[dtype][i > 0], f"result {i}")
