"""The simplest inner mixer there is, for tests of what stands around it: linear attention with a decay and a gate."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from lm_zoo.layers import LayerState
from lm_zoo.layers.base import recur, recurrent_state
from lm_zoo.linearized import INNER_MIXERS, InnerMixer


class PlainAttention(InnerMixer):
    """y_t = sigmoid(W h_t) S_t^T phi(q_t) / z_t . phi(q_t) with phi = elu(scale x) + 1 and a decay per head."""

    def __init__(self, *, num_heads, num_kv_heads, head_size, scale, hidden_size, decay: float = -0.1):
        super().__init__(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, scale=scale, hidden_size=hidden_size
        )
        if decay > 0:
            raise ValueError(f"decay must not be above 0, got {decay}")
        self.decay = nn.Parameter(torch.full((num_heads,), decay))
        self.gate = nn.Linear(hidden_size, num_heads)

    def init_state(self, batch_size, *, device, dtype):
        size = self.head_size
        return LayerState({"S": recurrent_state(batch_size, self.num_heads, size, size + 1, device, dtype)})

    def forward(self, q, k, v, *, context, state, cu_seqlens):
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for x in (k, v))
        q, k = (F.elu(x.float() * self.scale**0.5) + 1 for x in (q, k))
        v = F.pad(v.float(), (0, 1), value=1.0)
        decay = self.decay.float().expand(*q.shape[:3])
        o = recur(q, k, v, decay, scale=1.0, state=state, cu_seqlens=cu_seqlens)
        return o[..., :-1] / o[..., -1:] * self.gate(context.hidden).sigmoid()[..., None]


@contextlib.contextmanager
def plain_mixer():
    """The registry with "plain" in it."""
    INNER_MIXERS["plain"] = PlainAttention
    try:
        yield
    finally:
        del INNER_MIXERS["plain"]
