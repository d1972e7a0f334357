"""linear_cross_entropy against F.cross_entropy on the full logits, and its memory."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo.modules import loss as loss_module
from lm_zoo.modules.loss import linear_cross_entropy


@pytest.fixture(params=[1, 37 * 4, 37 * 100], ids=["1-row", "4-rows", "1-chunk"])
def chunks(request, monkeypatch):
    """Chunks of one row, of a few, and one for everything, for a vocabulary of 37."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", request.param)


def make(dtype=torch.float64, tokens=13, size=6, vocab=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[[0, 4, 5]] = -100
    return hidden, weight, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_cross_entropy(chunks, dtype, tolerance, reduction):
    hidden, weight, labels = make(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    exact = hidden.double(), weight.double()
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction=reduction)
    assert loss.dtype == dtype
    assert_close(loss, expected, tolerance)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        assert_close(a, b, tolerance)
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, weight, labels, reduction=reduction), expected, tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_z_loss_is_added(chunks, reduction):
    """Against the equation on the full logits, for both functions; ignored tokens have none."""
    hidden, weight, labels = make()
    logits = hidden @ weight.T
    squares = logits.logsumexp(dim=-1)[labels != -100].square()
    expected = F.cross_entropy(logits, labels, reduction=reduction) + 0.3 * getattr(squares, reduction)()
    correct = torch.autograd.grad(expected, (hidden, weight))
    options = {"reduction": reduction, "z_loss": 0.3}
    for loss in (
        linear_cross_entropy(hidden, weight, labels, **options),
        loss_module.cross_entropy_in_chunks(lambda h: h @ weight.T, 37, hidden, labels, **options),
    ):
        assert_close(loss, expected, 1e-13)
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), correct, strict=True):
            assert_close(a, b, 1e-13)
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, weight, labels, **options), expected, 1e-13)


def test_per_token_losses_for_evaluation(chunks):
    hidden, weight, labels = make()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert_close(losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none"), 1e-13)
    assert (losses[[0, 4, 5]] == 0).all()
    with pytest.raises(ValueError, match='reduction="none" gives no gradients'):
        linear_cross_entropy(hidden, weight, labels, reduction="none")


def test_gradcheck(chunks):
    hidden, weight, labels = make(tokens=6, size=3)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels), (hidden, weight))
    for frozen in (0, 1):  # only one of the two is trained
        inputs = [tensor.detach().clone() for tensor in (hidden, weight)]
        inputs[1 - frozen].requires_grad_()
        assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels), inputs)


def test_no_counted_token_gives_zero_and_not_nan():
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_another_ignored_label(chunks):
    hidden, weight, labels = make()
    labels = labels.clamp(min=0)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=0)
    assert_close(linear_cross_entropy(hidden, weight, labels, ignore_index=0), expected, 1e-13)


def test_under_autocast(chunks):
    hidden, weight, labels = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy((hidden @ weight.T).double(), labels)
    assert_close(loss, expected, 1e-2)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.float32
        assert_close(a, b, 2e-2)


def test_bfloat16_parameters():
    hidden, weight, labels = make(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that an op made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(getattr(self, "elements", 0), tensor.numel())
        return result


def test_a_large_vocabulary_never_meets_all_tokens():
    """2,000 tokens, 100,000 words: the logits would be 200 M elements. Nothing may pass a chunk, or the weight."""
    hidden = torch.randn(2000, 8, requires_grad=True)
    weight = torch.randn(100_000, 8, requires_grad=True)
    labels = torch.randint(100_000, (2000,))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert largest.elements <= max(loss_module.CHUNK_ELEMENTS, weight.numel())


def test_on_a_gpu_the_fused_kernels_take_over_where_they_are_installed(monkeypatch):
    """Here in their place stands what their documentation says; `test_fused_kernels` calls the real ones."""
    calls = []

    def fused(hidden, weight, labels, *, ignore_index, reduction, accum_dtype, lse_square_scale):
        calls.append((reduction, accum_dtype, lse_square_scale))
        return F.cross_entropy(hidden @ weight.T, labels, ignore_index=ignore_index, reduction=reduction)

    package, functional = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = fused
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    hidden, weight, labels = make(torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels)
    assert not calls
    monkeypatch.setattr(loss_module, "_fused_kernels_run", lambda hidden: True)
    assert_close(linear_cross_entropy(hidden, weight, labels), expected, 1e-6)
    assert calls == [("sum", torch.float32, 0.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_fused_kernels(z_loss):
    pytest.importorskip("liger_kernel")
    hidden, weight, labels = (x.detach().cuda() for x in make(torch.float32))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, labels, z_loss=z_loss)
    logits = hidden.double() @ weight.double().T
    expected = F.cross_entropy(logits, labels) + z_loss * logits.logsumexp(-1)[labels != -100].square().mean()
    assert_close(loss, expected, 1e-5)
    for actual, correct in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_close(actual, correct, 1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 6)}, ValueError, r"hidden must be \[N, D\]"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must be \[V, D\] = \[any, 6\], got \[9, 5\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be \[N\] = \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must have one of the dtypes int64, got float32"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    good = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(9, 6), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | changes)
