"""Gated linear attention: a matrix-valued state whose every key channel forgets at its own, input-dependent rate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_positive, check_size, head_size
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.norm import RMSNorm


class GatedLinearAttention(QKVMixer):
    r"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635).

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T        o_t = K^{-1/2} S_t^T q_t        per head
        a_t = sigmoid(W_2 W_1 x_t + b)^{1/16}      y_t = W_o (norm(o_t) * silu(W_g x_t))

    with q, k, v = W_q x, W_k x, W_v x. As in the authors' code, and unlike the paper's text, the norm of each head is
    an RMS norm and the output gate has no bias.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        expand_k, expand_v: width of the keys and of the values over all heads, relative to D.
        gate_rank: inner size of the low-rank map W_2 W_1 that makes the decays.
        gate_logit_normalizer: the 16 above; larger values forget more slowly.
        norm_eps: epsilon of the norm of the heads.

    The state is one float32 matrix `[B, H, K, V]`, whatever the length of the text.
    """

    paper = "Yang et al. 2023, arXiv 2312.06635"
    equation = "S_t = Diag(a_t) S_{t-1} + k_t v_t^T"
    decay = "per key channel"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads), ("gate_rank", gate_rank)):
            check_size(name, value)
        check_positive("gate_logit_normalizer", gate_logit_normalizer)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.key_size = head_size(hidden_size, num_heads, expand_k, "expand_k")
        self.value_size = head_size(hidden_size, num_heads, expand_v, "expand_v")
        self.gate_logit_normalizer = gate_logit_normalizer
        keys, values = num_heads * self.key_size, num_heads * self.value_size
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(hidden_size, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.norm = RMSNorm(self.value_size, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj", "decay_proj.1", "gate_proj"))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        return LayerState({"S": recurrent_state(*shape, device, dtype)})

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        expand = num_heads * head_size / hidden_size
        return {"num_heads": num_heads, "expand_k": expand, "expand_v": expand}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v, z, gate = (
            y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, self.decay_proj(x), self.gate_proj(x))
        )
        log_decay = F.logsigmoid(z.to(torch.promote_types(z.dtype, torch.float32))) / self.gate_logit_normalizer
        o = recur(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens)
        return self.norm(o, gate).flatten(2)
