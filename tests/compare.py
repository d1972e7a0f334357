"""The one comparer of the tests: relative error against a float64 expectation, both numbers printed when it fails."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, norms taken over the whole tensor in float64."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    return ((actual - expected).norm() / (norm if norm > 0 else 1.0)).item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "tensor") -> None:
    assert torch.isfinite(actual).all(), f"{what}: {(~torch.isfinite(actual)).sum().item()} values are not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, (
        f"{what}: relative error {error:.3g} > {tolerance:.3g} "
        f"(norms {actual.detach().double().norm():.6g} and {expected.detach().double().norm():.6g})"
    )
