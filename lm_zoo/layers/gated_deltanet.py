"""Gated DeltaNet: the delta rule on a state that also forgets, at a rate that each token sets."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_zoo.kernels import l2_norm
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_flag, check_positive, check_size, head_size
from lm_zoo.layers.deltanet import write_strength
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.decay import SoftplusDecay
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.short_conv import ShortConvolution


class GatedDeltaNet(QKVMixer):
    r"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464).

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T       o_t = K^{-1/2} S_t^T q_t        per head
        log a = -exp(A_log) softplus(W_a x + dt_bias)               b = sigmoid(W_b x)
        q, k = norm2(silu(conv(W x)))   v = silu(conv(W_v x))       y_t = W_o (norm(o_t) * silu(W_g x_t))

    norm2(u) = u / sqrt(u.u + 1e-6), per head; the norm of each head of o is an RMS norm. conv is causal, over
    `conv_size` tokens and each channel by itself; the three convolutions are one over the channels of q, k and v.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H, heads of the queries and keys.
        num_value_heads: HV, heads of the values, decays and write strengths, a multiple of H: each head of q and k
            serves HV / H of them. H if not given.
        expand_k, expand_v: width of the keys and of the values over all heads, relative to D.
        conv_size: tokens that the convolution sees.
        allow_negative_eigenvalues: b = 2 sigmoid(W_b x) (Grazzi et al. 2024, arXiv 2411.12537), see `DeltaNet`.
        use_gate: without it y_t = W_o norm(o_t), an option of the authors' code.
        norm_eps: epsilon of the norm of the heads.

    The state is one float32 matrix `[B, HV, K, V]` and the last inputs of the convolution, whatever the length of the
    text.
    """

    paper = "Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464"
    equation = "S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T"
    decay = "per token"
    update = "delta rule"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 6,
        *,
        num_value_heads: int | None = None,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_size: int = 4,
        allow_negative_eigenvalues: bool = False,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_value_heads": num_value_heads}
        for name, value in (sizes | {"conv_size": conv_size}).items():
            check_size(name, value)
        if num_value_heads % num_heads:
            raise ValueError(f"num_value_heads must be a multiple of num_heads = {num_heads}, got {num_value_heads}")
        check_flag("allow_negative_eigenvalues", allow_negative_eigenvalues)
        check_flag("use_gate", use_gate)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_value_heads = num_value_heads
        self.key_size = head_size(hidden_size, num_heads, expand_k, "expand_k")
        self.value_size = head_size(hidden_size, num_value_heads, expand_v, "expand_v")
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        keys, values = num_heads * self.key_size, num_value_heads * self.value_size
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_size)
        self.decay_proj = nn.Linear(hidden_size, num_value_heads, bias=False)
        self.log_decay = SoftplusDecay(num_value_heads, rates=(0.0, 16.0))
        self.beta_proj = nn.Linear(hidden_size, num_value_heads, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False) if use_gate else None
        self.norm = RMSNorm(self.value_size, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def cut(self) -> Cut:
        keys, values = self.num_heads * self.key_size, self.num_value_heads * self.value_size
        columns = ("q_proj", "k_proj", "v_proj", "decay_proj", "log_decay", "beta_proj", "gate_proj")
        counts = ("num_heads", "num_value_heads", "conv.channels")
        return Cut(columns, sections={"conv": (keys, keys, values)}, counts=counts)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.num_value_heads, self.key_size, self.value_size)
        S = recurrent_state(*shape, device, dtype)
        return LayerState({"S": S, "conv": self.conv.init_state(batch_size, device, dtype)})

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        expand = num_heads * head_size / hidden_size
        return {"num_heads": num_heads, "num_value_heads": num_heads, "expand_k": expand, "expand_v": expand}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        qkv = torch.cat([q, k, v], dim=-1)
        qk, v = self.conv(qkv, state, cu_seqlens).tensor_split((2 * self.num_heads * self.key_size,), dim=-1)
        q, k = l2_norm(qk.unflatten(-1, (2 * self.num_heads, -1))).chunk(2, dim=2)
        v = v.unflatten(-1, (self.num_value_heads, -1))
        log_decay = self.log_decay(self.decay_proj(x))
        beta = write_strength(self.beta_proj(x), self.allow_negative_eigenvalues)
        o = recur(q, k, v, log_decay, beta, state=state, cu_seqlens=cu_seqlens)
        gate = None if self.gate_proj is None else self.gate_proj(x).unflatten(-1, (self.num_value_heads, -1))
        return self.norm(o, gate).flatten(2)
