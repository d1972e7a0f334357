"""Cross entropy straight from hidden states, without ever holding the logits of all tokens."""

import importlib.util
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lm_zoo.kernels.checks import check_option, check_same, check_shape, check_tensor

CHUNK_ELEMENTS = 2**22  # logits held at a time: 16 MB in float32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    r"""Cross entropy of the logits h W^T, computed over chunks of tokens.

        loss_n = log Z_n - h_n . w_{label_n} + z_loss (log Z_n)^2        Z_n = sum_v exp(h_n . w_v)

    Equals `F.cross_entropy(hidden @ weight.T, labels)`, but only the logits of one chunk are alive at a time. Where
    gradients are needed, the same sweep computes them, in the shapes of hidden and weight: nothing is computed twice.
    Softmax and sums are in float32 (float64 for float64 inputs); under autocast the products are in its dtype. On a
    GPU, where the package `liger-kernel` is installed (`pip install lm_zoo[gpu]`), its fused kernels do the same.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`; a DTensor whose rows are shared by ranks, which then all make this call with the same tokens.
        labels: `[N]` int64; tokens labelled `ignore_index` do not count.
        reduction: "mean" over the counted tokens (0 where there are none), "sum", or "none": `[N]`, 0 at ignored
            tokens, without gradients.
        z_loss: weight of (log Z)^2, which keeps the logits from drifting away (PaLM, arXiv 2204.02311).

    Returns:
        The loss in nats, float32 (or float64), a scalar or `[N]`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or "none" where gradients are needed.
        IndexError or a device-side assertion: a label outside of [0, V).
    """
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    check_tensor("labels", labels, (torch.int64,))
    check_shape("hidden", hidden, "[N, D]", (-1, -1))
    check_shape("weight", weight, "[V, D]", (-1, hidden.shape[1]))
    check_shape("labels", labels, "[N]", (hidden.shape[0],))
    check_same("weight", weight, "hidden", hidden, dtype=False)
    check_same("labels", labels, "hidden", hidden, dtype=False)
    check_option("reduction", reduction, ("mean", "sum", "none"))
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    shared = None
    if isinstance(weight, DTensor):
        shared, weight = SharedRows(weight.device_mesh, weight.shape[0]), weight.to_local()
    if reduction == "none" and needs_grad:
        raise ValueError('reduction="none" gives no gradients: call it under torch.no_grad(), or use "sum" or "mean"')
    if needs_grad and shared is None and _fused_kernels_run(hidden):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {"ignore_index": ignore_index, "reduction": "sum", "accum_dtype": torch.float32}
        total = liger_fused_linear_cross_entropy(hidden, weight, labels, lse_square_scale=z_loss, **options)
    elif needs_grad:
        total = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, z_loss, shared)
    else:
        losses = _sweep(hidden, weight, labels, ignore_index, z_loss, shared)[0]
        if reduction == "none":
            return losses
        total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def cross_entropy_in_chunks(
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of `head(hidden)` for any head, `[N, D]` to `[N, V]`: with a bias, a cap, an adapter.

    As `linear_cross_entropy`, which is quicker: here the backward pass computes each chunk's logits again.
    """
    check_option("reduction", reduction, ("mean", "sum", "none"))

    def losses(h: Tensor, y: Tensor) -> Tensor:
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, y, ignore_index=ignore_index, reduction="none")
        if z_loss:
            loss = loss + z_loss * logits.logsumexp(dim=-1).square() * (y != ignore_index)
        return loss

    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = [
        checkpoint(losses, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    total = torch.cat(chunks)
    if reduction == "none":
        return total
    return total.sum() if reduction == "sum" else total.sum() / (labels != ignore_index).sum().clamp(min=1)


def _fused_kernels_run(hidden: Tensor) -> bool:
    on_gpu = hidden.is_cuda and hidden.dtype != torch.float64
    return on_gpu and importlib.util.find_spec("liger_kernel") is not None


class SharedRows:
    """A vocabulary of which each rank of a mesh has as many tokens, in turn."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int):
        self.group, self.count = mesh.get_group(), vocab_size // mesh.size()
        self.first = mesh.get_local_rank() * self.count

    def has(self, labels: Tensor) -> Tensor:
        return (labels >= self.first) & (labels < self.first + self.count)

    def join(self, log_total: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        """log Z over all ranks, and the labels' logits, each of which one rank has and the others give as 0."""
        own = torch.stack([log_total, logit])
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(parts, own, group=self.group)
        log_totals, logits = torch.stack(parts, dim=1)
        return log_totals.logsumexp(dim=0), logits.sum(dim=0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses; its gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, z_loss, shared):
        needs_grad = ctx.needs_input_grad[:2]
        losses, grad_hidden, grad_weight = _sweep(hidden, weight, labels, ignore_index, z_loss, shared, needs_grad)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grads = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _sweep(hidden, weight, labels, ignore_index, z_loss, shared, needs_grad=(False, False)):
    """The loss of each token, and the gradients of their sum for hidden and weight where asked for.

    With `shared`, the weight is this rank's part of its rows, and so is its gradient.
    """
    product_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # autocast leaves float64 alone
        product_dtype = torch.get_autocast_dtype(hidden.device.type)
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.zeros(labels.shape, dtype=sum_dtype, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_grad[1] else None
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    h, w = hidden.to(product_dtype), weight.to(product_dtype)
    first = 0 if shared is None else shared.first
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        logits = (h[chunk] @ w.T).to(sum_dtype)
        counted = labels[chunk] != ignore_index
        here = counted if shared is None else counted & shared.has(labels[chunk])
        target = (labels[chunk] - first).where(here, 0)[:, None]
        log_total, logit = logits.logsumexp(dim=-1, keepdim=True), logits.gather(1, target)
        if shared is not None:
            log_total, logit = shared.join(log_total, logit * here[:, None])
        loss = log_total - logit
        if z_loss:
            loss += z_loss * log_total.square()
        losses[chunk] = loss.squeeze(1) * counted
        if grad_hidden is None and grad_weight is None:
            continue
        # The gradient for the logits, in their place: softmax minus one-hot, 0 at ignored tokens.
        dlogits = logits.sub_(log_total).exp_()
        if z_loss:
            dlogits.mul_(1 + 2 * z_loss * log_total)
        dlogits.scatter_add_(1, target, -here[:, None].to(dlogits.dtype))
        dlogits = dlogits.mul_(counted[:, None]).to(product_dtype)
        if grad_hidden is not None:
            grad_hidden[chunk] = dlogits @ w
        if grad_weight is not None:
            _add_product(grad_weight, dlogits.T, h[chunk])
    if shared is not None and grad_hidden is not None:
        dist.all_reduce(grad_hidden, group=shared.group)
    return losses, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
