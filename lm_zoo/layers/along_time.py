"""Where a layer mixes along time: a function that is linear in its values, once its other arguments are given.

    o_t = sum_s M_ts v_s        M_ts of the other arguments alone: queries, keys, gates

Decorated, such a function works as it did, and `watched` sees its calls. That is how `lm_zoo.eval.implicit_attention`
finds M in every mixer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """A call of a function that mixes along time."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]  # by their names
    values: str  # the name of the argument that the function is linear in
    time: int  # its dimension of time, and the output's

    def __call__(self, values: Tensor) -> Tensor:
        """The output with other values in the place of the call's own."""
        return self.function(**self.arguments | {self.values: values})


_calls: list[Mixing] | None = None


def along_time(values: str, *, time: int = 1, gate: str | None = None) -> Callable:
    """Decorates the function or method of a layer that mixes along time.

    Args:
        values: the argument that it is linear in: `[B, T, heads, V]`, whose V channels it treats alike, or `[B, T, D]`.
        time: the dimension of time, if not 1.
        gate: an argument, `None` where there is none, that only multiplies the output; a `Mixing` leaves it out.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if _calls is None:
                return function(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            if gate is not None:
                arguments[gate] = None
            _calls.append(Mixing(function, arguments, values, time))
            with watched(None):  # what this one calls is a part of it
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def watched(calls: list[Mixing] | None) -> Iterator[None]:
    """Inside the `with` block, what mixes along time is noted in `calls`."""
    global _calls
    before, _calls = _calls, calls
    try:
        yield
    finally:
        _calls = before
