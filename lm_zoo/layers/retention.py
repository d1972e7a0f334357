"""Multi-scale retention: linear attention that forgets at one constant rate per head."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_positive, check_size, head_size
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.rotary import advance, rotary, token_positions


class MultiScaleRetention(QKVMixer):
    r"""Multi-scale retention of RetNet (Sun et al. 2023, arXiv 2307.08621).

        S_t = g_h S_{t-1} + k_t v_t^T       o_t = K^{-1/2} S_t^T q_t       g_h = 1 - 2^{-5-h},  h = 0 .. H-1
        q_t = R_t W_q x_t                   k_t = R_t W_k x_t              y_t = W_o (norm(o_t) * silu(W_g x_t))

    R_t is the rotary embedding at position t. The paper's xPos is this rotation with a decay, and here the decay is
    g_h itself. The norm of each head is an RMS norm with a weight, for the paper's group norm; the paper's other
    normalisations cancel in it.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        expand_k, expand_v: width of the keys and of the values over all heads, relative to D.
        rope_base: base of the rotary angles.
        norm_eps: epsilon of the norm of the heads.

    The state is one float32 matrix `[B, H, K, V]` and the position of each row, whatever the length of the text.
    """

    paper = "Sun et al. 2023, arXiv 2307.08621"
    equation = "S_t = g_h S_{t-1} + k_t v_t^T"
    decay = "constant per head"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        check_positive("rope_base", rope_base)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.key_size = head_size(hidden_size, num_heads, expand_k, "expand_k")
        self.value_size = head_size(hidden_size, num_heads, expand_v, "expand_v")
        if self.key_size % 2:
            raise ValueError(f"expand_k must give each head an even number of key channels, got {self.key_size}")
        self.rope_base = rope_base
        keys, values = num_heads * self.key_size, num_heads * self.value_size
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.norm = RMSNorm(self.value_size, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj", "gate_proj"))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LayerState({"S": recurrent_state(*shape, device, dtype), "position": position})

    def log_decay(self, x: Tensor) -> Tensor:
        """log g_h, `[H]`: computed, since a buffer would be rounded by `model.bfloat16()`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        h = torch.arange(self.ranks * self.num_heads, device=x.device, dtype=dtype)
        return self.own(torch.log1p(-torch.exp2(-5.0 - h)))

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        expand = num_heads * head_size / hidden_size
        return {"num_heads": num_heads, "expand_k": expand, "expand_v": expand}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v, gate = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, self.gate_proj(x)))
        start = None if state is None else state["position"]
        positions = token_positions(x.shape[1], start, cu_seqlens, device=x.device)
        q, k = rotary(torch.cat([q, k], dim=2), positions, base=self.rope_base).chunk(2, dim=2)
        o = recur(q, k, v, self.log_decay(x), state=state, cu_seqlens=cu_seqlens)
        if state is not None:
            advance(x, state, cu_seqlens)
        return self.norm(o, gate).flatten(2)
