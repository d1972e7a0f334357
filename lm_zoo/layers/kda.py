"""Kimi delta attention: the delta rule on a state whose every key channel forgets at its own rate."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_zoo.kernels import l2_norm
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_flag, check_positive, check_size
from lm_zoo.layers.deltanet import write_strength
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.decay import SoftplusDecay
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.short_conv import ShortConvolution


class KimiDeltaAttention(QKVMixer):
    r"""Kimi delta attention of Kimi Linear (Kimi Team 2025, arXiv 2510.26692).

        S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T     o_t = K^{-1/2} S_t^T q_t        per head
        log a = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias)             b = sigmoid(W_b x)
        q, k = norm2(silu(conv(W x)))   v = silu(conv(W_v x))           y_t = W_o (norm(o_t) * sigmoid(W_4 W_3 x_t))

    norm2(u) = u / sqrt(u.u + 1e-6), per head; the norm of each head of o is an RMS norm. conv is causal, over
    `conv_size` tokens and each channel by itself; the three convolutions are one over the channels of q, k and v. The
    maps W_2 W_1 and W_4 W_3 have the rank of one head, and no biases, as in the paper's text.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        head_size: K and V, channels per head; hidden_size / H if not given. The paper's models have 128.
        conv_size: tokens that the convolution sees.
        allow_negative_eigenvalues: b = 2 sigmoid(W_b x) (Grazzi et al. 2024, arXiv 2411.12537), see `DeltaNet`.
        norm_eps: epsilon of the norm of the heads.

    The state is one float32 matrix `[B, H, K, V]` and the last inputs of the convolution, whatever the length of the
    text.
    """

    paper = "Kimi Team 2025, arXiv 2510.26692"
    equation = "S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T"
    decay = "per key channel"
    update = "delta rule"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        *,
        head_size: int | None = None,
        conv_size: int = 4,
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads), ("conv_size", conv_size)):
            check_size(name, value)
        if head_size is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads = {num_heads} does not divide hidden_size = {hidden_size}: change one or give head_size"
            )
        head_size = hidden_size // num_heads if head_size is None else head_size
        check_size("head_size", head_size)
        check_flag("allow_negative_eigenvalues", allow_negative_eigenvalues)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_size = head_size
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        channels = num_heads * head_size
        self.q_proj = nn.Linear(hidden_size, channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, channels, bias=False)
        self.conv = ShortConvolution(3 * channels, conv_size)
        self.decay_proj = low_rank(hidden_size, head_size, channels)
        self.log_decay = SoftplusDecay(num_heads, head_size)
        self.beta_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.gate_proj = low_rank(hidden_size, head_size, channels)
        self.norm = RMSNorm(head_size, eps=norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def cut(self) -> Cut:
        columns = ("q_proj", "k_proj", "v_proj", "decay_proj.1", "log_decay", "beta_proj", "gate_proj.1")
        sections = {"conv": 3 * (self.num_heads * self.head_size,)}
        return Cut(columns, sections=sections, counts=("num_heads", "conv.channels"))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        S = recurrent_state(batch_size, self.num_heads, self.head_size, self.head_size, device, dtype)
        return LayerState({"S": S, "conv": self.conv.init_state(batch_size, device, dtype)})

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        return {"num_heads": num_heads, "head_size": head_size}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        qkv = self.conv(torch.cat([q, k, v], dim=-1), state, cu_seqlens).unflatten(-1, (3 * self.num_heads, -1))
        qk, v = qkv.tensor_split((2 * self.num_heads,), dim=2)
        q, k = l2_norm(qk).chunk(2, dim=2)
        decay, gate = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.decay_proj, self.gate_proj))
        beta = write_strength(self.beta_proj(x), self.allow_negative_eigenvalues)
        o = recur(q, k, v, self.log_decay(decay), beta, state=state, cu_seqlens=cu_seqlens)
        return (self.norm(o) * gate.sigmoid()).flatten(2)


def low_rank(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))
