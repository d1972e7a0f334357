"""Which implementation of an op runs.

    backend="auto"          Triton for tensors on a GPU where Triton works, PyTorch elsewhere
    use_backend("torch")    what "auto" means inside the `with` block
    LM_ZOO_BACKEND=torch    what "auto" means in this process

An op that is asked for a backend by its argument runs that one or raises; an "auto" that cannot have Triton falls to
PyTorch, with one warning where a GPU would have had it.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_option

OPTIONS = ("auto", "triton", "torch", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # no cached function: torch.compile warns of those

_override = os.environ.get("LM_ZOO_BACKEND", "auto")
_warned: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the `with` block, ops whose `backend` is "auto" take this one."""
    global _override
    check_option("name", name, OPTIONS)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def choose(backend: str, x: Tensor, options: tuple[str, ...] = OPTIONS, *, unsupported: str | None = None) -> str:
    """The implementation to run on tensors like x: "triton", "torch" or "reference".

    `options` are those of the op, `unsupported` says what of this call its Triton kernels cannot do.
    """
    check_option("backend", backend, options)
    asked = backend
    if backend == "auto":
        check_option("LM_ZOO_BACKEND", _override, OPTIONS)
        backend = _override if _override in options else "auto"
    if backend not in ("auto", "triton"):
        return backend
    if backend == "auto" and x.device.type != "cuda":
        return "torch"
    reason = _why_not_triton(x) or unsupported
    if reason is None:
        return "triton"
    if asked == "triton":
        raise ValueError(f'backend="triton" cannot run here: {reason}; use backend="torch"')
    _warn_once(reason)
    return "torch"


def _why_not_triton(x: Tensor) -> str | None:
    if not TRITON_IS_INSTALLED:
        return "triton is not installed"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need a GPU (or TRITON_INTERPRET=1), the tensors are on {x.device}"
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels compute in float32, bfloat16 and float16, the tensors are {x.dtype}".replace("torch.", "")
    return None


def _warn_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _warned:  # a warning would break the graph
        return
    _warned.add(reason)
    warnings.warn(f"lm_zoo falls back from Triton to PyTorch: {reason}", RuntimeWarning, stacklevel=4)
