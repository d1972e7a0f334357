"""Floating-point operations of a model per token, and how many a device can do per second.

Only products are counted, a multiplication and an addition as two: of the linear maps, and of the recurrence as its
equation has it, token by token. The chunkwise form does more of them, and so does recomputation: that is the price of
an implementation, not work of the model. Elementwise work is not counted.

    S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t        4 per number of the state: the write and the read
    with the delta rule                                   6: it also reads what its key finds
    h_t = f_t * h_{t-1} + x_t                             0
    softmax attention                                     4 per query channel and token seen
"""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from lm_zoo.causal_lm import CausalLM
from lm_zoo.layers import Mixer, SoftmaxAttention
from lm_zoo.modules.feature_maps import FeatureMap

TRAINING_PASSES = 3  # a backward pass has two products for each one of the forward pass

# Dense products per second, in 10^12 floating-point operations: (bfloat16 and float16, float32) as the makers state.
PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "MI300": (1307.0, 163.4),
}


def flops_per_token(model: CausalLM, seq_len: int) -> float:
    """Of the forward pass, the mean over a text of `seq_len` tokens."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return linear_flops(model) + sum(mixer.ranks * state_flops(mixer, seq_len) for mixer in mixers)


def linear_flops(module: nn.Module) -> int:
    """Per token, of all the linear maps in a module."""
    linear = [part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear)]
    maps = [p.numel() for part in module.modules() if isinstance(part, FeatureMap) for p in part.parameters()]
    biases = [part.bias.numel() for part in module.modules() if isinstance(part, FeatureMap) and hasattr(part, "bias")]
    return 2 * (sum(linear) + sum(maps) - sum(biases))


def state_flops(mixer: Mixer, seq_len: int) -> float:
    """Per token, of a layer's recurrence or attention."""
    if isinstance(mixer, SoftmaxAttention):
        seen = min(mixer.window or seq_len, seq_len)
        tokens_seen = seen - seen * (seen - 1) / 2 / seq_len  # the first ones see fewer
        return 4 * mixer.num_heads * mixer.head_size * tokens_seen
    state = mixer.init_state(1, device="meta")
    matrix = state["S" if "S" in state else "h"]
    if matrix.dim() < 3:
        return 0.0
    numbers = matrix.numel() * (2 if matrix.is_complex() else 1)
    steps = getattr(mixer, "num_householders", 1)
    return (6 if mixer.update.startswith("delta rule") else 4) * numbers * steps


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Per second, of products in `dtype`: as stated for a GPU that is known here, as measured for a CPU."""
    if device.type == "cpu":
        return _measured(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in PEAKS.items():
        if known in name:
            tf32 = torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
            return 1e12 * (half if dtype != torch.float32 else half / 2 if tf32 else single)
    return None


@functools.cache
def _measured(dtype: torch.dtype, size: int = 1024, trials: int = 5) -> float:
    """The best of a few products of square matrices."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(trials):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
