"""The backward passes of linear attention in Triton: each against its twin in PyTorch, then all gradients of the op
against the recurrence in float64."""

import pytest
import torch
from compare import assert_close
from triton_twins import DECAYS, DEVICE, Twins

UPDATES = pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
EVERY_DECAY = pytest.mark.parametrize("decay", DECAYS)

# Odd sizes, packed with empty and short sequences, decays that forget all at once, values in groups.
SHAPES = {
    "odd": {"T": 71, "K": 17, "V": 5},
    "packed": {"T": 150, "cu_seqlens": torch.tensor([0, 0, 70, 71, 150, 150])},
    "strong": {"T": 70, "lowest": -50.0, "resets": 0.1},
    "grouped": {"T": 65, "B": 2, "H": 2, "HV": 4, "K": 16, "V": 16},
    "float16": {"T": 71, "K": 17, "V": 5, "dtype": torch.float16},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def twins_before(name, decay, delta, shape):
    """With what the passes before `name` have found."""
    options = dict(SHAPES[shape])
    if "cu_seqlens" in options:
        options["cu_seqlens"] = options["cu_seqlens"].to(DEVICE)
    twins = Twins(decay, delta, **options)
    twins.advance_to(name)
    return twins


def compare(twins, name, expected):
    """The Triton pass without the scores that it forms itself, against `expected`."""
    tolerance = 1e-5 if twins.dtype == torch.float32 else 4e-3
    actual = twins.triton_pass(name, () if twins.decay == "channel" else ("A_qk", "A_kk"))
    for key, x in actual.items():
        if key in ("dA_qk", "dA_kk") and twins.decay != "channel":
            assert x is None, f"{key} is used up in {name}"
        elif x is not None:
            select = twins.order if key == "dstates" else slice(None)
            assert_close(x[select], expected[key][select], tolerance, f"{name}: {key}")


def with_scores_backward(twins, found):
    """What a pass found, and what the scores' backward pass adds to it, where Triton does both in one kernel."""
    if twins.decay == "channel":
        return found
    twins.values |= found
    return found | twins.torch_pass("chunk_scores_backward")


@EVERY_SHAPE
@EVERY_DECAY
def test_chunk_output_backward(decay, shape):
    twins = twins_before("chunk_output_backward", decay, False, shape)
    compare(twins, "chunk_output_backward", twins.torch_pass("chunk_output_backward"))


@EVERY_SHAPE
@EVERY_DECAY
@UPDATES
def test_chunk_states_backward(decay, delta, shape):
    twins = twins_before("chunk_states_backward", decay, delta, shape)
    compare(twins, "chunk_states_backward", twins.torch_pass("chunk_states_backward"))


@EVERY_SHAPE
@EVERY_DECAY
@UPDATES
def test_chunk_gradients(decay, delta, shape):
    twins = twins_before("chunk_gradients", decay, delta, shape)
    expected = with_scores_backward(twins, twins.torch_pass("chunk_gradients"))
    compare(twins, "chunk_gradients", expected)


@EVERY_SHAPE
@EVERY_DECAY
def test_delta_transform_backward(decay, shape):
    twins = twins_before("delta_transform_backward", decay, True, shape)
    before = dict(twins.values)
    twins.values["dA_qk"] = torch.zeros_like(twins.values["dA_qk"])
    expected = with_scores_backward(twins, twins.torch_pass("delta_transform_backward"))
    twins.values = before
    compare(twins, "delta_transform_backward", expected)
