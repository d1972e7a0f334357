"""Softmax attention: the transformer's mixer, as baseline and as partner in hybrids."""

import torch
from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.checks import check_input, check_positive, check_size
from lm_zoo.layers.kv_state import key_values, softmax_attention
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.rotary import rotary, token_positions


class SoftmaxAttention(Mixer):
    r"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions and grouped heads.

        o_t = sum_s softmax_s(K^{-1/2} q_t . k_s) v_s    over s <= t, and t - s < window        y_t = W_o o_t
        q_t = R_t W_q x_t      k_t = R_t W_k x_t      v_t = W_v x_t      R_t: the rotary embedding at position t

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H, heads of the queries.
        num_kv_heads: heads of the keys and values, a divisor of H (Ainslie et al. 2023); H if not given.
        head_size: K, channels per head, even; hidden_size / H if not given.
        window: how many tokens each query sees, itself included; all before it if not given.
        rope_base: base of the rotary angles.

    The state holds the keys and values: with a window that many, at fixed addresses, else all (its tensors are replaced
    by longer ones as the text grows).
    """

    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    equation = "o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s"
    decay = "none"
    update = "keeps keys and values"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        window: int | None = None,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_size("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        if head_size is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads = {num_heads} does not divide hidden_size = {hidden_size}: change one or give head_size"
            )
        head_size = hidden_size // num_heads if head_size is None else head_size
        check_size("head_size", head_size)
        if head_size % 2:
            raise ValueError(f"head_size must be even for rotary positions, got {head_size}")
        if window is not None:
            check_size("window", window)
        check_positive("rope_base", rope_base)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.window = window
        self.rope_base = rope_base
        self.q_proj = nn.Linear(hidden_size, num_heads * head_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(num_heads * head_size, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj"), counts=("num_heads", "num_kv_heads"))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        return key_values(batch_size, self.num_kv_heads, self.head_size, self.window, device, dtype)

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        start = None if state is None else state["position"]
        positions = token_positions(x.shape[1], start, cu_seqlens, device=x.device)
        q, k = rotary(torch.cat([q, k], dim=2), positions, base=self.rope_base).split_with_sizes(
            (self.num_heads, self.num_kv_heads), dim=2
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = softmax_attention(q, k, v, window=self.window, state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(o.transpose(1, 2).flatten(2))
