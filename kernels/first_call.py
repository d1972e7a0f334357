"""The first call of an op compiles all kernels of the call at once, on threads. One after the other, as their launches
come, forward and backward of the gated delta rule take more than 7 s.

Which kernels a call launches is known to nobody but the call. So one that comes to a kernel that is not compiled is
given up, is run again with launches that do nothing but compile, and then for good:

    @torch.library.custom_op("lm_zoo::op", mutates_args=())
    @compiles_at_once
    def op(x): ...

Such an op may write to nothing but its results. What is called after it, its backward pass, can be rehearsed along:

    @compiles_at_once(then=lambda arguments, results: op_backward(results[0], *arguments))
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# What a launch does about a kernel that is not compiled: "compile" it, "give up" the call, or "rehearse": have it
# compiled in the background, and launch nothing.
stage: ContextVar[str] = ContextVar("stage", default="compile")


class NotCompiled(Exception):
    """Ends the attempt to run an op."""


def compiles_at_once(op: Callable | None = None, *, then: Callable[[tuple, Any], object] | None = None) -> Callable:
    if op is None:
        return functools.partial(compiles_at_once, then=then)

    @functools.wraps(op)
    def run(*arguments, **options):
        if stage.get() == "rehearse":  # along with another op
            return op(*arguments, **options)
        outside = stage.set("give up")
        try:
            return op(*arguments, **options)
        except NotCompiled:
            pass
        finally:
            stage.reset(outside)
        with _rehearsal():
            results = op(*arguments, **options)
            if then is not None:
                then(arguments, results)
            del results
        return op(*arguments, **options)  # compiles what is still missing, or raises what is wrong with it

    return run


@contextmanager
def _rehearsal() -> Iterator[None]:
    from lm_zoo.kernels.triton_kernel import compile_in_background  # by now, Triton is there

    outside = stage.set("rehearse")
    try:
        with compile_in_background():
            yield
    finally:
        stage.reset(outside)
