"""What the tests of the layers against papers and other libraries share: plain equations, and weights copied over."""

import torch
from compare import assert_close


def build(mixer, *arguments, **options):
    """A layer in float64 whose norms, decays and write strengths differ between heads and channels."""
    torch.manual_seed(0)
    layer = mixer(*arguments, **options).double()
    for name, parameter in layer.named_parameters():
        if "norm" in name or name == "D":
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        if "beta_proj" in name or "decay_proj" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.7)
    return layer


def convolve(u, weight, bias=None):
    """y_t = silu(sum_w weight[:, w] u_{t - W + 1 + w} + bias)"""
    size = weight.shape[1]
    rows = []
    for t in range(u.shape[1]):
        window = [weight[:, w] * u[:, t - size + 1 + w] for w in range(size) if t - size + 1 + w >= 0]
        rows.append(sum(window) + (0 if bias is None else bias))
    y = torch.stack(rows, dim=1)
    return y * torch.sigmoid(y)


def rms_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def assert_same_layer(layer, other, x, pairs, tolerance=1e-5):
    """The same outputs, and gradients for the input and all weights.

    `pairs` are our weights, theirs (which take our values), and a view of theirs in the layout of ours.
    """
    with torch.no_grad():
        for ours, theirs, arrange in pairs:
            arrange(theirs).copy_(ours)
    x = x.requires_grad_()
    dy = torch.randn(*x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    y, expected = layer(x), other(x)
    assert_close(y, expected, tolerance)
    ours, theirs, _ = zip(*pairs, strict=True)
    assert len(ours) == len(list(layer.parameters()))
    found = torch.autograd.grad(y, [x, *ours], dy)
    wanted = torch.autograd.grad(expected, [x, *theirs], dy)
    assert_close(found[0], wanted[0], tolerance, "gradient of x")
    for a, b, (_, _, arrange) in zip(found[1:], wanted[1:], pairs, strict=True):
        assert_close(a, arrange(b), 10 * tolerance, "gradient of a weight")


def same(weight):
    return weight


def conv1d(weight):
    return weight.squeeze(1)
