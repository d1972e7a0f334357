"""Checks that the constructors and the forward passes of all layers share."""

import math

from torch import Tensor

from lm_zoo.kernels.checks import check_cu_seqlens
from lm_zoo.layers.base import LayerState


def check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_index(name: str, value: object, size_name: str, size: object) -> None:
    """`value` counts from 0 to below `size`."""
    check_size(size_name, size)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 0 <= value < size:
        raise ValueError(f"{name} must be in [0, {size_name} = {size}), got {value}")


def channels_per_head(hidden_size: int, num_heads: int, head_size: int | None) -> int:
    """`head_size`, or hidden_size / num_heads if it is not given."""
    if head_size is not None:
        check_size("head_size", head_size)
        return head_size
    if hidden_size % num_heads:
        raise ValueError(f"num_heads = {num_heads} does not divide hidden_size = {hidden_size}: change one of them")
    return hidden_size // num_heads


def head_size(hidden_size: int, num_heads: int, expand: float, name: str) -> int:
    """Channels per head when the layer is `expand` times as wide as its input; `name` is the argument of `expand`."""
    check_positive(name, expand)
    width = expanded(hidden_size, expand)
    if width % num_heads:
        raise ValueError(
            f"{name} = {expand} makes hidden_size = {hidden_size} to {width:g} channels, which num_heads = {num_heads} "
            f"cannot share evenly: change one of the three"
        )
    return int(width) // num_heads


def expanded(hidden_size: int, expand: float) -> float:
    """hidden_size * expand, exactly whole where it is but for the rounding of `expand` = 1/3 or the like."""
    width = hidden_size * expand
    return round(width) if math.isclose(width, round(width), rel_tol=1e-9) else width


def check_input(x: Tensor, hidden_size: int, state: LayerState | None, cu_seqlens: Tensor | None) -> None:
    """The input of a layer: `[B, T, D]` with T >= 1, and a state with one row per sequence."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must be [B, T, D] with D = hidden_size = {hidden_size}, got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError("x must have at least one token, got T = 0")
    check_texts(x, state, cu_seqlens)


def check_texts(x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> None:
    """Whether the borders of packed texts fit `[B, T, ...]`, and a state has one row per text."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.device)
    if state is not None:
        if not isinstance(state, LayerState):
            raise TypeError(f"state must be what init_state() returns, got {type(state).__name__}")
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if state.batch_size != rows:
            wanted = "B" if cu_seqlens is None else "N"
            raise ValueError(f"state must have {wanted} = {rows} rows, got {state.batch_size}")
