"""A gated linear attention and a sliding window side by side, made from the teacher's own projections: Liger."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.layers.base import LayerState, recurrent_state
from lm_zoo.layers.checks import check_size, check_texts
from lm_zoo.layers.kv_state import WindowKeyValues, softmax_attention
from lm_zoo.linearized.grouped import grouped_linear_attention
from lm_zoo.linearized.inner import INNER_MIXERS, Context, InnerMixer

GATE_NORMALIZER = 16.0
KEPT = ("keys", "values", "position")  # of the window


class LigerAttention(InnerMixer):
    r"""Liger (Lan et al. 2025, arXiv 2503.01496): no new parameters.

        S_n = Diag(e^{g_n}) S_{n-1} + softmax(k_n) v_n^T        g_n = logsigmoid(k_n) / 16        per key channel
        y_n = (1 - share) softmax_{i > n - window}(scale R_n q_n . R_i k_i) v_i + share S_n^T softmax(q_n)

    q and k in the first line are the teacher's before the rotary embedding R, and their softmax is over the channels of
    a head. The paper makes the gate of the pooled key projection; in the authors' code that is an adaptive average from
    HKV D channels to HKV D, that is of each channel alone, and so it is here: head h's gate is its key. With grouped
    heads, all queries of a group read the one state of their key head.

    Args:
        window: tokens that the softmax sees, the present one included.
        share: of the gated linear attention in the output.

    The state is S `[B, HKV, D, D]` in float32 and a ring of `window` keys and values.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        hidden_size: int,
        window: int = 64,
        share: float = 0.5,
    ):
        super().__init__(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=scale,
            hidden_size=hidden_size,
        )
        check_size("window", window)
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"share must be a number, got {share!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.window = window
        self.share = share

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LayerState:
        shape = (batch_size, self.num_kv_heads, self.window, self.head_size)
        tensors = {
            "keys": torch.zeros(shape, device=device, dtype=dtype),
            "values": torch.zeros(shape, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, dtype=torch.int64, device=device),
            "S": recurrent_state(batch_size, self.num_kv_heads, self.head_size, self.head_size, device, dtype),
        }
        return WindowKeyValues(tensors)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, context: Context, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        check_texts(q, state, cu_seqlens)
        window = None
        if state is not None:
            window = WindowKeyValues({name: state[name] for name in KEPT})
            window.journal = state.journal
        near = softmax_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            window=self.window,
            scale=self.scale,
            state=window,
            cu_seqlens=cu_seqlens,
        ).transpose(1, 2)
        with torch.autocast(q.device.type, enabled=False):  # it would round what is read from the state
            far = self._gated(q, k, v, context, state, cu_seqlens)
        return ((1 - self.share) * near + self.share * far).to(q.dtype)

    def _gated(self, q, k, v, context, state, cu_seqlens) -> Tensor:
        x = turn_back(torch.cat([q, k], dim=2), context.rotary)
        log_decay = F.logsigmoid(x[:, :, self.num_heads :]) / GATE_NORMALIZER
        q, k = x.softmax(dim=-1).split_with_sizes((self.num_heads, self.num_kv_heads), dim=2)
        return grouped_linear_attention(q, k, v.to(k.dtype), log_decay, state=state, cu_seqlens=cu_seqlens)


def turn_back(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    r"""x as it was before the rotary embedding of transformers, in float32 at least.

        x'_a = c x_a - s x_b        x'_b = c x_b + s x_a        so        x_a = (c x'_a + s x'_b) / (c^2 + s^2)

    for the channels a and b = a + R / 2 of the R that are turned. Where cos and sin are scaled (YaRN, LongRoPE), or
    rounded, c^2 + s^2 is not 1.

    Args:
        x: `[B, T, H, D]`. rotary: cos and sin `[B or 1, T, R]`, R <= D, or `None`: x was not turned.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if rotary is None:
        return x
    cos, sin = (y[:, :, None].to(x.dtype) for y in rotary)
    turned, passed = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    length = cos.square() + sin.square()
    return torch.cat([turned * (cos / length) - torch.cat([-b, a], dim=-1) * (sin / length), passed], dim=-1)


INNER_MIXERS["liger"] = LigerAttention
