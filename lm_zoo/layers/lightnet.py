"""LightNet: linear attention whose keys are a running softmax over time, so that nothing needs a denominator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, recurrent_state
from lm_zoo.layers.checks import channels_per_head, check_positive, check_size
from lm_zoo.layers.prefix import PrefixMixer, recur_prefix
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.log_sum_exp import running_log_sum_exp
from lm_zoo.modules.norm import RMSNorm


class LightNetState(LayerState):
    """S `[B, H, K, V]` and z `[B, H K]`, which is -inf before the first token."""

    def reset(self) -> None:
        super().reset()
        self["z"].fill_(-torch.inf)


class LightNet(PrefixMixer):
    r"""The additive recurrence of LightNet (Qin et al. 2024, arXiv 2405.21022), causal.

        z_t = log(exp(z_{t-1}) + exp(W_k x_t))                                                per key channel
        S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(W_k x_t - z_t) v_t^T                     per head
        o_t = S_t^T silu(W_q x_t)       v_t = W_v x_t       y_t = W_o (norm(o_t) * silu(W_2 W_1 x_t))

    Each row of S_t is the average of v_s, s <= t, with the weights softmax_s(W_k x_s): a new token counts for 1 / t.
    The paper scans images from one end to the other; this is its recurrence alone, in the form of a language model's
    layer. The norm is an RMS norm over all heads.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H; one for every 128 channels if not given.
        head_size: K and V, channels per head; hidden_size / H if not given.
        gate_rank: inner size of the low-rank map W_2 W_1 of the output gate.
        norm_eps: epsilon of the norm.

    The state is one float32 matrix `[B, H, K, V]` and z in float64, whatever the length of the text. z grows like
    log t and its steps shrink like 1 / t, which float32 could no longer tell from 0 after some million tokens.

    An average has no order: `layer(x, prefix_length=M)` lets the first M tokens see all of each other, see
    `PrefixMixer`.
    """

    paper = "Qin et al. 2024, arXiv 2405.21022"
    equation = "S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T"
    decay = "per key channel"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        *,
        head_size: int | None = None,
        gate_rank: int = 128,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        num_heads = max(1, hidden_size // 128) if num_heads is None else num_heads
        check_size("num_heads", num_heads)
        check_size("gate_rank", gate_rank)
        check_positive("norm_eps", norm_eps)
        self.head_size = channels_per_head(hidden_size, num_heads, head_size)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        channels = num_heads * self.head_size
        self.q_proj = nn.Linear(hidden_size, channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, channels, bias=False)
        self.gate_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_rank, bias=False), nn.Linear(gate_rank, channels, bias=False)
        )
        self.norm = RMSNorm(channels, eps=norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj", "gate_proj.1", "norm"), norms=("norm",))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LightNetState:
        device, dtype = self._placement(device, dtype)
        S = recurrent_state(batch_size, self.num_heads, self.head_size, self.head_size, device, dtype)
        return LightNetState({"S": S, "z": self._start(batch_size, device)})

    def _start(self, rows: int, device: torch.device) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        return torch.full((rows, self.num_heads * self.head_size), -torch.inf, device=device, dtype=wide)

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        return {"num_heads": num_heads, "head_size": head_size}

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        *,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        q, logits = F.silu(q), k
        if state is not None and state.journal is not None:
            state.record("z", add_to_sum, logits)
        if state is None:
            start = self._start(x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, x.device)
        else:
            start = state["z"].clone()  # the write below must not reach what the backward pass reads
        before, z, last = running_log_sum_exp(logits, start, cu_seqlens, output_final_state=state is not None)
        dtype = torch.promote_types(q.dtype, torch.float32)
        log_decay, k = (before - z).clamp(max=0).to(dtype), (logits - z).exp().to(q.dtype)
        q, k, v, log_decay = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, log_decay))
        o = recur_prefix(q, k, v, log_decay, prefix=prefix, scale=1.0, state=state, cu_seqlens=cu_seqlens)
        if state is not None:
            state.write("z", last)
        return self.norm(o.flatten(2), self.gate_proj(x))


def add_to_sum(logits: Tensor, *, state: LayerState) -> None:
    """z alone led on by the keys' logits `[B, T, H K]`."""
    state.write("z", running_log_sum_exp(logits, state["z"])[2])
