"""Which implementation runs: by argument, by the context manager, by the environment, by what the tensors allow."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from lm_zoo.kernels import backends, linear_attention
from lm_zoo.kernels.backends import choose, use_backend

ON_CPU = torch.zeros(1)


@pytest.fixture
def triton_works(monkeypatch):
    """As if the tensors were on a GPU that Triton can use."""
    monkeypatch.setattr(backends, "_why_not_triton", lambda x: None)
    backends._warned.clear()


class OnGpu:
    """As much of a CUDA tensor as `choose` looks at."""

    device = torch.device("cuda")
    dtype = torch.float32


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu(triton_works):
    assert choose("auto", ON_CPU) == "torch"
    assert choose("auto", OnGpu()) == "triton"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_context_manager_says_what_auto_means(triton_works, name):
    with use_backend(name):
        assert choose("auto", OnGpu()) == name
        with use_backend("triton"):
            assert choose("auto", ON_CPU) == "triton"
        assert choose("auto", OnGpu()) == name
        assert choose("triton", OnGpu()) == "triton", "an argument goes before the context"
    assert choose("auto", OnGpu()) == "triton"


def test_the_context_manager_ends_with_an_error_too(triton_works):
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert choose("auto", OnGpu()) == "triton"


def test_an_op_without_the_wanted_backend_takes_its_own_choice():
    with use_backend("reference"):
        assert choose("auto", ON_CPU, ("auto", "triton", "torch")) == "torch"


def test_the_context_manager_reaches_the_ops():
    q = torch.randn(1, 70, 1, 8)
    plain = linear_attention(q, q, q)[0]
    with use_backend("reference"):
        inside = linear_attention(q, q, q)[0]
    assert torch.equal(inside, linear_attention(q, q, q, backend="reference")[0])
    assert not torch.equal(inside, plain), "the two sum in another order"


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("torch", "torch"), ("auto", "torch")])
def test_the_environment_says_what_auto_means(value, expected):
    code = "import torch; from lm_zoo.kernels.backends import choose; print(choose('auto', torch.zeros(1)))"
    environment = os.environ | {"LM_ZOO_BACKEND": value}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == expected


def test_a_wrong_name_in_the_environment_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_override", "cuda")
    with pytest.raises(ValueError, match=r"LM_ZOO_BACKEND must be one of 'auto', .*, got 'cuda'"):
        choose("auto", ON_CPU)


def test_wrong_names_are_named():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"):
        linear_attention(*torch.zeros(3, 1, 1, 1, 8), backend="cuda")
    with pytest.raises(ValueError, match="name must be one of"), use_backend("cuda"):
        pass


def test_triton_on_a_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'backend="triton" cannot run here: .*need a GPU.*use backend="torch"'):
        linear_attention(*torch.zeros(3, 1, 1, 1, 8), backend="triton")


def test_what_triton_cannot_do_is_refused_if_it_was_asked_for(triton_works):
    with pytest.raises(ValueError, match="heads of at most 256 channels, got 300"):
        linear_attention(*torch.zeros(3, 1, 1, 1, 300), backend="triton")


def test_what_triton_cannot_do_falls_to_torch_with_one_warning(triton_works):
    with pytest.warns(RuntimeWarning, match="falls back from Triton to PyTorch: too wide"):
        assert choose("auto", OnGpu(), unsupported="too wide") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", OnGpu(), unsupported="too wide") == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_triton_does_not_compute_in(monkeypatch, dtype):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"the tensors are {dtype}".replace("torch.", "")):
        choose("triton", torch.zeros(1, dtype=dtype))
