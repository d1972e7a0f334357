"""Softmax attention within a window, linear attention beyond it, under one denominator: LoLCATs and Hedgehog."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lm_zoo.kernels.checks import check_option
from lm_zoo.layers.base import LayerState, recurrent_state
from lm_zoo.layers.checks import check_texts
from lm_zoo.linearized.grouped import add_to_state, grouped_linear_attention, read_state
from lm_zoo.linearized.inner import INNER_MIXERS, Context, InnerMixer
from lm_zoo.linearized.ring import RingState
from lm_zoo.linearized.window import (
    WINDOWS,
    Blocks,
    ring_sums,
    scores,
    text_lengths,
    weighted_sum,
    window_sums,
)
from lm_zoo.modules.feature_maps import FEATURE_MAPS, HalvedHedgehog
from lm_zoo.modules.init import fill_

FEATURES = {name: kind for name, kind in FEATURE_MAPS.items() if kind.positive} | {"hedgehog": HalvedHedgehog}
PER = ("query_head", "kv_head")
BETAS = ("one", "complement")
GAMMA = 0.1  # of the window at first
TINY = 1e-30  # a denominator without a window can underflow: then 0 rather than 0 / 0


class HybridAttention(InnerMixer):
    r"""LoLCATs (Zhang et al. 2024, arXiv 2410.10254); with no window Hedgehog (Zhang et al. 2024, arXiv 2402.04347).

        y_n = [ gamma sum_{i in window} e^{s_ni - c_n} v_i + beta phi_q(q_n)^T sum_{j before it} phi_k(k_j) v_j^T ]
              / [ gamma sum_{i in window} e^{s_ni - c_n}   + beta phi_q(q_n)^T sum_{j before it} phi_k(k_j) ]

    with s_ni = scale q_n . k_i, c_n = max_i s_ni over the window and gamma = sigmoid(w_h) per query head, at first 0.1.
    The window of token n is the last w tokens ("sliding"), or its own block of w and the one before ("terrace"), n
    itself included. Where it holds the whole text, gamma cancels and y is the teacher's attention exactly.

    Args:
        feature_map: phi: "hedgehog", [softmax(W x), softmax(-W x)] with W per head, at first the identity; or another
            map of `lm_zoo.modules.feature_maps` whose features are not negative.
        feature_map_per: whether each query head has its own map for the keys ("query_head", as published) or the heads
            that share keys share it ("kv_head"): then they share the state too.
        window: w; 0 for none, which is linear attention alone.
        window_kind: "sliding" or "terrace".
        beta: "one" or "complement", 1 - gamma.
        window_dropout: in training mode, the probability that a call without a state has no window: all tokens are then
            "before it", n included, so that the features learn what the window would do for them.

    The state is S `[B, HS, F, D + 1]` in float32, whose last column is the sum of phi_k, HS = H or HKV; and a ring of w
    ("sliding") or 2 w ("terrace") keys and values. What the window has left goes from the ring into S: token by token
    where it slides, block by block in a terrace.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        hidden_size: int,
        feature_map: str = "hedgehog",
        feature_map_per: str = "query_head",
        window: int = 64,
        window_kind: str = "terrace",
        beta: str = "one",
        window_dropout: float = 0.0,
    ):
        super().__init__(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=scale,
            hidden_size=hidden_size,
        )
        check_option("feature_map", feature_map, tuple(FEATURES))
        check_option("feature_map_per", feature_map_per, PER)
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window must be an integer, got {window!r}")
        if window < 0:
            raise ValueError(f"window must be at least 0, got {window}")
        check_option("window_kind", window_kind, WINDOWS)
        check_option("beta", beta, BETAS)
        if isinstance(window_dropout, bool) or not isinstance(window_dropout, int | float):
            raise TypeError(f"window_dropout must be a number, got {window_dropout!r}")
        if not 0 <= window_dropout <= 1:
            raise ValueError(f"window_dropout must be in [0, 1], got {window_dropout}")
        self.window = window
        self.window_kind = window_kind
        self.beta = beta
        self.window_dropout = window_dropout
        self.state_heads = num_heads if feature_map_per == "query_head" else num_kv_heads
        self.q_map = FEATURES[feature_map](num_heads, head_size)
        self.k_map = FEATURES[feature_map](self.state_heads, head_size)
        self.window_gate = nn.Parameter(torch.empty(num_heads)) if window else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate; the feature maps reset themselves."""
        if self.window_gate is not None:
            fill_(self.window_gate, torch.tensor(math.log(GAMMA / (1 - GAMMA))))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LayerState:
        shape = (batch_size, self.state_heads, self.k_map.size, self.head_size + 1)
        S = recurrent_state(*shape, device, dtype)
        if self.window == 0:
            return LayerState({"S": S})
        slots = self.window if self.window_kind == "sliding" else 2 * self.window
        return RingState.empty(batch_size, self.num_kv_heads, slots, self.head_size, S, dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, context: Context, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        check_texts(q, state, cu_seqlens)
        dtype = q.dtype
        q = q.to(torch.promote_types(dtype, torch.float32))
        with torch.autocast(q.device.type, enabled=False):  # it would round the sums, whose quotient is then coarse
            if self.window and state is not None and state.journal is not None:
                state.record(tuple(state), self._push, k, v)
            if self.window == 0 or (state is None and self._drop_window()):
                sums = self._linear(q, k.to(q.dtype), v.to(q.dtype), state, cu_seqlens)
            elif state is not None and q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
                sums = self._step(q[:, 0], k, v, state)[:, None]
            else:
                sums = self._blocks(q, k.to(q.dtype), v.to(q.dtype), state, cu_seqlens)
        return (sums[..., :-1] / sums[..., -1:].clamp_min(TINY)).to(dtype)

    def _drop_window(self) -> bool:
        return self.training and self.window_dropout > 0 and torch.rand(()).item() < self.window_dropout

    def _linear(self, q, k, v, state, cu_seqlens) -> Tensor:
        """Every token before n and n itself by the features."""
        text_lengths(q.shape[:2], cu_seqlens)  # for its check: the op would count the rows of a group, not tokens
        return grouped_linear_attention(self.q_map(q), *self._written(k, v), state=state, cu_seqlens=cu_seqlens)

    def _blocks(self, q, k, v, state, cu_seqlens) -> Tensor:
        """Any number of tokens: the window in blocks, the tokens before it through the op, late by the window."""
        shape = tuple(q.shape[:2])
        if state is None and cu_seqlens is None:
            blocks = Blocks.of_batch(shape, min(self.window, shape[1]), q.device)
        else:
            lengths = text_lengths(shape, cu_seqlens)
            size = min(self.window, max(lengths)) if state is None else self.window
            blocks = Blocks.of_texts(shape, lengths, state, size, self.window_kind, q.device)
        remembered = (None, None) if state is None else (state["keys"], state["values"])
        new_k, new_v = k, v
        q, k, v = blocks.lay(q), blocks.lay(k, remembered[0]), blocks.lay(v, remembered[1])

        phi_q, (phi_k, written_v) = self.q_map(q), self._written(k, v)
        phi_k = phi_k * blocks.exists[..., None, None]
        late = 1 if self.window_kind == "sliding" else 2
        phi_k, written_v = blocks.before(phi_k, late), blocks.before(written_v, late)
        if self.window_kind == "sliding" and state is not None:  # the void at a text's end pushes nothing out of it
            phi_k = phi_k * blocks.new[..., None, None]
        late_state = None if state is None else LayerState({"S": state["S"]})  # what it writes is on record
        linear = grouped_linear_attention(
            *(blocks.along_time(x) for x in (phi_q, phi_k, written_v)), state=late_state, cu_seqlens=blocks.borders
        ).view(*phi_q.shape[:3], -1)
        if self.window_kind == "terrace":  # late by 2 w, the op has brought the block before the window's up to n - 2 w
            linear = linear + weighted_sum(scores(phi_q, phi_k).triu(1), written_v)
        near = window_sums(q, k, _with_ones(v), blocks, scale=self.scale, kind=self.window_kind)
        if state is not None:
            state.extend(new_k.flatten(0, 1), new_v.flatten(0, 1), lengths)
        return blocks.read(self._mix(near, linear))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: RingState) -> Tensor:
        """One token per row, q `[B, H, D]`, without gradients."""
        self._push(k, v, state=state)
        near = ring_sums(q, state, scale=self.scale, size=self.window, kind=self.window_kind)
        return self._mix(near, read_state(self.q_map(q[:, None])[:, 0], state["S"]))

    def _push(self, k: Tensor, v: Tensor, *, state: RingState) -> None:
        """Token by token into the window `[B, T, HKV, D]`, and what leaves it into S, without gradients."""
        S = state.writable("S")
        for t in range(k.shape[1]):
            leaving = state.oldest(1 if self.window_kind == "sliding" else self.window)
            if leaving is not None:
                rows, k_out, v_out = leaving
                add_to_state(S, *self._written(k_out.to(S.dtype), v_out.to(S.dtype)), rows)
            state.swap(k[:, t], v[:, t])

    def _written(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into S: phi_k(k) `[B, T, HS, F]` and [v, 1] `[B, T, HS, D + 1]`."""
        repeats = self.state_heads // self.num_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        return self.k_map(k), _with_ones(v)

    def _mix(self, near: Tensor, linear: Tensor) -> Tensor:
        """gamma near + beta linear, `[..., H, D + 1]`."""
        gamma = self.window_gate.to(near.dtype).sigmoid()[:, None]
        return gamma * near + (linear if self.beta == "one" else (1 - gamma) * linear)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


INNER_MIXERS["hybrid"] = HybridAttention
