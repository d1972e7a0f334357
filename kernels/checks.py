"""Checks at the door of the public ops: each error names the argument, what came and what was expected.

They look at shapes, dtypes, devices and host values only, never at the contents of a GPU tensor, so they cost no
synchronisation.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {_names(dtypes)}, got {_names((value.dtype,))}")


def check_shape(name: str, value: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    """`layout` is how the docstring writes the shape, `shape` the sizes that it has here; -1 takes any size."""
    fits = value.dim() == len(shape)
    if fits:
        for want, have in zip(shape, value.shape, strict=True):
            fits = fits and (want == -1 or want == have)  # no `in`: torch.compile's symbolic sizes only know ==
    if not fits:
        expected = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} must be {layout} = [{expected}], got {list(value.shape)}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}: move one of them")
    if dtype and value.dtype != other.dtype:
        raise ValueError(
            f"{name} is {_names((value.dtype,))} but {other_name} is {_names((other.dtype,))}: cast one of them"
        )


def check_option(name: str, value: object, options: tuple) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_values(name: str, value: Tensor, expected: str, fits: Callable[[Tensor], Tensor]) -> None:
    """Contents, where they are on the host: elsewhere, and inside a compiled graph, looking would be a stall."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not fits(value.detach()).all():
        worst = value.detach().flatten()[(~fits(value.detach())).flatten()][0].item()
        raise ValueError(f"{name} must be {expected}, got {worst:g}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, device: torch.device) -> None:
    """The shape of `cu_seqlens`; its contents are checked by `check_bounds` where they are on the host."""
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs its sequences along time, so B must be 1, got B = {batch}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but the inputs are on {device}: move one of them")


def check_bounds(bounds: list[int], length: int) -> None:
    """The contents of `cu_seqlens`: from 0 to T, never decreasing."""
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    if bounds[-1] != length:
        raise ValueError(f"cu_seqlens must end at T = {length}, got {bounds[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start} then {end} at index {n + 1}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
