"""The count of operations against torch's counter, for every mixer, with the recurrences written as products."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from compare import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.flops import PEAKS, flops_per_token, peak_flops, state_flops
from lm_zoo.layers import MIXERS

LENGTH, SIZE = 6, 64
SMALL = {"num_heads": 2}
OPTIONS = {
    "hgrn": {}, "mamba": {"state_size": 4}, "mamba2": {"head_size": 32, "state_size": 8}, "s4d": {"state_size": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2}, "deltaproduct": {"num_heads": 2, "num_householders": 3},
}  # fmt: skip


def linear_attention(q, k, v, log_decay=None, beta=None, *, scale=None, cu_seqlens=None):
    """Token by token, every product of the equation a matrix product."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2).to(torch.float32) for x in (q, k))
    S = torch.zeros(*k.shape[:1], heads, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            a = log_decay if log_decay.dim() == 1 else log_decay[:, t]
            S = S * (a.exp().view(-1, heads, 1, 1) if a.dim() < 3 else a.exp()[..., None])
        write = v[:, t].float()
        if beta is not None:
            write = beta[:, t, :, None] * (write - (k[:, t, :, None] @ S).squeeze(2))
        S = S + k[:, t, :, :, None] @ write[:, :, None]
        outputs.append((q[:, t, :, None] @ S).squeeze(2))
    return torch.stack(outputs, dim=1).to(v.dtype) * (k.shape[-1] ** -0.5 if scale is None else scale), None


def selective_scan(x, dt, A, B, C, D=None, z=None, *, cu_seqlens=None):
    h, outputs = torch.zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[:, :, None] @ B[:, t, None]
        outputs.append((h @ C[:, t, :, None]).squeeze(2))
    return (torch.stack(outputs, dim=1) + D * x) * torch.nn.functional.silu(z), None


def convolve(u, a, b, c):
    """S4D's 2 Re(c h) of complex states, as real numbers."""
    h, outputs = torch.zeros(u.shape[0], *b.shape, dtype=b.dtype), []
    read = torch.view_as_real(2 * c.conj().resolve_conj()).flatten(1)
    for t in range(u.shape[1]):
        write = u[:, t].reshape(-1, 1, 1) @ torch.view_as_real(b).flatten(1).repeat(u.shape[0], 1)[:, None]
        h = a.exp().to(b.dtype) * h + torch.view_as_complex(write.view(*u.shape[::2], -1, 2))
        rows = torch.view_as_real(h).flatten(2)[..., None, :] @ read[None, :, :, None].expand(u.shape[0], -1, -1, -1)
        outputs.append(rows[..., 0, 0])
    return torch.stack(outputs, dim=1)


def softmax_attention(q, k, v, *, window=None, state=None, cu_seqlens=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for t in range(q.shape[2]):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        weights = (q[:, :, t, None] @ k[:, :, seen].mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append(weights @ v[:, :, seen])
    return torch.cat(outputs, dim=2)


AS_PRODUCTS = {
    "lm_zoo.layers.base": {"linear_attention": linear_attention},
    "lm_zoo.layers.mamba": {"selective_scan": selective_scan},
    "lm_zoo.layers.s4d": {"convolve": convolve},
    "lm_zoo.layers.attention": {"softmax_attention": softmax_attention},
}


def build(name: str, **options) -> ZooForCausalLM:
    torch.manual_seed(0)
    mixers = {"it": {"type": name, **OPTIONS.get(name, SMALL), **options}}
    config = ZooConfig(vocab_size=32, hidden_size=SIZE, num_hidden_layers=2, intermediate_size=64, mixers=mixers)
    return ZooForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in MIXERS]
    + [("attention", {"window": 4}), ("linear_attention", {"feature_map": "hedgehog"}), ("hgrn", {"complex": True})],
)
@torch.no_grad()
def test_the_count_is_that_of_the_equation(name, options) -> None:
    """The equations as products give the layer's own output, so what is counted is what the layer computes."""
    model = build(name, **options)
    tokens = torch.randint(32, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    with ExitStack() as patches, FlopCounterMode(display=False) as counter:
        for module, functions in AS_PRODUCTS.items():
            for function, replacement in functions.items():
                patches.enter_context(patch.object(sys.modules[module], function, replacement))
        logits = model(tokens).logits
    assert_close(logits, expected, 1e-4)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "convolution" not in str(op))  # of one channel with itself
    assert flops_per_token(model, LENGTH) * LENGTH == products


def test_long_windows_and_short_texts() -> None:
    layer = build("attention", window=4).model.layers[0].mixer
    channels = layer.num_heads * layer.head_size
    assert state_flops(layer, 2) == 4 * channels * 1.5
    assert state_flops(layer, 1_000_000) == pytest.approx(4 * channels * 4, rel=1e-5)


def test_a_training_step_takes_about_six_operations_per_parameter() -> None:
    model = ZooForCausalLM(ZooConfig.preset("gla-tiny", vocab_size=8192))
    parameters = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert flops_per_token(model, 256) / 2 == pytest.approx(model.lm_head.weight.numel() + parameters, rel=0.1)


def test_peaks(monkeypatch) -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, half, single in [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12), ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12), ("AMD Instinct MI300X", 1307e12, 163.4e12),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, torch.bfloat16) == peak_flops(gpu, torch.float16) == half
        assert peak_flops(gpu, torch.float32) == single
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "of tomorrow")
    assert peak_flops(gpu, torch.bfloat16) is None
    assert all(half > single for half, single in PEAKS.values())
