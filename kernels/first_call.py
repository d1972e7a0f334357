"""The first call of an op compiles all kernels of the call at once, on threads. One after the other, as their launches
come, forward and backward of the gated delta rule take more than 7 s.

Which kernels a call launches is known to nobody but the call. So one that comes to a kernel that is not compiled is
given up, is run again with launches that do nothing but compile, and then for good:

    @torch.library.custom_op("lm_zoo::op", mutates_args=())
    @compiles_at_once
    def op(x): ...

Such an op may write to nothing but its results.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar

# What a launch does about a kernel that is not compiled: "compile" it, "give up" the call, or "rehearse": have it
# compiled in the background, and launch nothing.
stage: ContextVar[str] = ContextVar("stage", default="compile")


class NotCompiled(Exception):
    """Ends the attempt to run an op."""


def compiles_at_once(op: Callable) -> Callable:
    @functools.wraps(op)
    def run(*arguments, **options):
        outside = stage.set("give up")
        try:
            return op(*arguments, **options)
        except NotCompiled:
            pass
        finally:
            stage.reset(outside)
        _rehearse(lambda: op(*arguments, **options))
        return op(*arguments, **options)  # compiles what is still missing, or raises what is wrong with it

    return run


def _rehearse(call: Callable[[], object]) -> None:
    from lm_zoo.kernels.triton_kernel import compile_in_background  # by now, Triton is there

    outside = stage.set("rehearse")
    try:
        with compile_in_background():
            call()
    finally:
        stage.reset(outside)
