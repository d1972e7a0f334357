"""DeltaProduct: several steps of the delta rule per token, so that a token may turn the state, not only reflect it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels import l2_norm
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_flag, check_input, check_positive, check_size, head_size
from lm_zoo.layers.deltanet import write_strength
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.decay import SoftplusDecay
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.short_conv import ShortConvolution


class DeltaProduct(QKVMixer):
    r"""DeltaProduct (Siems et al. 2025, arXiv 2502.10297).

        S_{t,j} = (I - b_tj k_tj k_tj^T) S_{t,j-1} + b_tj k_tj v_tj^T,  j = 1 .. n      S_{t,0} = a_t S_{t-1,n}
        o_t = K^{-1/2} S_{t,n}^T q_t                                                    per head
        q, k_j = norm2(silu(conv(W x)))   v_j = silu(conv(W_v x))   b_j = 2 sigmoid(W_b x)   y_t = W_o norm(o_t)

    n generalised Householder steps per token, each with its own keys, values and write strengths, computed as n tokens
    of the delta rule. Their product can be any orthogonal matrix at n = K, and turns in a plane at n = 2. Ungated
    (the default) a_t = 1; gated, as in the authors' Gated DeltaProduct, the decay and the output gate are those of
    Gated DeltaNet: log a = -exp(A_log) softplus(W_a x + dt_bias) and y_t = W_o (norm(o_t) * silu(W_g x_t)).

    norm2(u) = u / sqrt(u.u + 1e-6), per head; the norm of each head of o is an RMS norm. conv is causal, over
    `conv_size` tokens and each channel by itself; all convolutions are one over the channels of q, k and v.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        num_householders: n, steps per token; 1 is DeltaNet, or Gated DeltaNet.
        gated: see above.
        expand_k, expand_v: width of the keys and of the values of one step over all heads, relative to D.
        conv_size: tokens that the convolution sees.
        allow_negative_eigenvalues: b_j in [0, 2], on by default since only then the steps can reflect; else in [0, 1].
        norm_eps: epsilon of the norm of the heads.

    The state is one float32 matrix `[B, H, K, V]` and the last inputs of the convolution, whatever the length of the
    text.
    """

    paper = "Siems et al. 2025, arXiv 2502.10297"
    equation = "S_t = prod_j (I - b_tj k_tj k_tj^T) S_{t-1} + ..., n delta-rule steps per token"
    decay = "none, or per token"
    update = "delta rule, n steps"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        num_householders: int = 2,
        gated: bool = False,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        allow_negative_eigenvalues: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_householders": num_householders}
        for name, value in (sizes | {"conv_size": conv_size}).items():
            check_size(name, value)
        check_flag("gated", gated)
        check_flag("allow_negative_eigenvalues", allow_negative_eigenvalues)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_householders = num_householders
        self.key_size = head_size(hidden_size, num_heads, expand_k, "expand_k")
        self.value_size = head_size(hidden_size, num_heads, expand_v, "expand_v")
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.gated = gated
        keys, values = num_heads * self.key_size, num_heads * self.value_size
        self.conv_sizes = (keys, num_householders * keys, num_householders * values)
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_householders * keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_householders * values, bias=False)
        self.conv = ShortConvolution(sum(self.conv_sizes), conv_size)
        self.beta_proj = nn.Linear(hidden_size, num_householders * num_heads, bias=False)
        if gated:
            self.decay_proj = nn.Linear(hidden_size, num_heads, bias=False)
            self.log_decay = SoftplusDecay(num_heads, rates=(0.0, 16.0))
            self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.norm = RMSNorm(self.value_size, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def cut(self) -> Cut:
        """The maps of all steps are one matrix each, so every rank holds these."""
        n, keys, values = self.num_householders, self.num_heads * self.key_size, self.num_heads * self.value_size
        steps = {"k_proj": n * (keys,), "v_proj": n * (values,), "beta_proj": n * (self.num_heads,)}
        return Cut(
            columns=("q_proj", "decay_proj", "log_decay", "gate_proj"),
            sections=steps | {"conv": (keys, *n * (keys,), *n * (values,))},
            counts=("num_heads", "conv_sizes", "conv.channels"),
        )

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        S = recurrent_state(*shape, device, dtype)
        return LayerState({"S": S, "conv": self.conv.init_state(batch_size, device, dtype)})

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        return self.o_proj(self._mix(self.q_proj(x), self.k_proj(x), self.v_proj(x), x, state, cu_seqlens))

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        expand = num_heads * head_size / hidden_size
        return {"num_heads": num_heads, "expand_k": expand, "expand_v": expand}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """As in `QKVMixer`: the steps share a token's key and value, and each has its own convolution of them."""
        k, v = (y.repeat(1, 1, self.num_householders) for y in (k, v))
        return self._mix(q, k, v, x, state, cu_seqlens)

    def _mix(self, q, k, v, x, state, cu_seqlens) -> Tensor:
        n, heads = self.num_householders, self.num_heads
        q, k, v = self.conv(torch.cat([q, k, v], dim=-1), state, cu_seqlens).split(self.conv_sizes, dim=-1)
        # Each token becomes n along time: it is read with q in the last of them, and forgets in the first.
        k, v = (u.unflatten(-1, (n, heads, -1)).flatten(1, 2) for u in (k, v))
        q = l2_norm(q.unflatten(-1, (heads, -1)))
        q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        beta = write_strength(self.beta_proj(x), self.allow_negative_eigenvalues)
        beta = beta.unflatten(-1, (n, heads)).flatten(1, 2)
        log_decay = None
        if self.gated:
            log_decay = self.log_decay(self.decay_proj(x))
            log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
        o = self._steps(q, l2_norm(k), v, log_decay, beta, state, cu_seqlens)
        gate = self.gate_proj(x).unflatten(-1, (heads, -1)) if self.gated else None
        return self.norm(o, gate).flatten(2)

    @along_time("v")
    def _steps(self, q, k, v, log_decay, beta, state, cu_seqlens) -> Tensor:
        """o of T tokens, `[B, T, H, V]`, from the `[B, n T, H, *]` of their steps."""
        n = self.num_householders
        borders = None if cu_seqlens is None else n * cu_seqlens
        return recur(q, k, v, log_decay, beta, micro_steps=n, state=state, cu_seqlens=borders)[:, n - 1 :: n]
