"""Lightning attention: linear attention whose heads forget at constant rates, set by head and depth."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels.checks import check_option
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import channels_per_head, check_flag, check_index, check_positive, check_size
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.rotary import LearnedRotary, advance, token_positions


class LightningAttention(QKVMixer):
    r"""Lightning attention of TransNormerLLM (Qin et al. 2023, arXiv 2307.14995; Lightning Attention-2, 2401.04658).

        S_t = e^{-s} S_{t-1} + k_t v_t^T      o_t = S_t^T q_t      s = 2^{-8 h / H} (1 - l / (L - 1))     per head
        q_t = R_t silu(W_q x_t)               k_t = R_t silu(W_k x_t)        y_t = W_o (norm(o_t) * W_g x_t)

    for head h = 1 .. H of layer l = 0 .. L - 1, so that deeper layers remember longer. R_t is LRPE, in the first layer
    only: k_s and q_t then meet as sum_d q_td k_sd cos(theta_d (t - s)), theta learned. The slopes are those of the
    authors' code (the paper's text has 8 h / H for 2^{-8 h / H}). Unlike there, the RMS norm over all heads has a
    weight.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        head_size: K and V, channels per head; hidden_size / H if not given.
        lrpe: whether there is LRPE, which doubles the state; in the first layer if not given.
        gate: "linear" as above, or "sigmoid" as in MiniMax-01 (arXiv 2501.08313).
        silu_values: whether the values go through a SiLU too, as in MiniMax-01.
        layer_index, num_layers: l and L; the model gives them.
        norm_eps: epsilon of the norm.

    The state is one float32 matrix `[B, H, K, V]` (2 K with LRPE, and each row's position), whatever the length.
    """

    paper = "Qin et al. 2023, arXiv 2307.14995"
    equation = "S_t = e^{-s_h} S_{t-1} + k_t v_t^T"
    decay = "constant per head and layer"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        *,
        head_size: int | None = None,
        lrpe: bool | None = None,
        gate: str = "linear",
        silu_values: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        check_index("layer_index", layer_index, "num_layers", num_layers)
        lrpe = layer_index == 0 if lrpe is None else lrpe
        check_flag("lrpe", lrpe)
        check_option("gate", gate, ("linear", "sigmoid"))
        check_flag("silu_values", silu_values)
        check_positive("norm_eps", norm_eps)
        head_size = channels_per_head(hidden_size, num_heads, head_size)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_size = head_size
        self.gate = gate
        self.silu_values = silu_values
        self.layer_index = layer_index
        self.num_layers = num_layers
        channels = num_heads * head_size
        self.q_proj = nn.Linear(hidden_size, channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, channels, bias=False)
        self.gate_proj = nn.Linear(hidden_size, channels, bias=False)
        self.lrpe = LearnedRotary(num_heads, self.head_size) if lrpe else None
        self.norm = RMSNorm(channels, eps=norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj", "gate_proj", "lrpe", "norm"), norms=("norm",))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        keys = self.head_size if self.lrpe is None else 2 * self.head_size
        tensors = {"S": recurrent_state(batch_size, self.num_heads, keys, self.head_size, device, dtype)}
        if self.lrpe is not None:
            tensors["position"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LayerState(tensors)

    def log_decay(self, x: Tensor) -> Tensor:
        """-s, `[H]`: computed, since a buffer would be rounded by `model.bfloat16()`."""
        heads = self.ranks * self.num_heads
        h = torch.arange(1, heads + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        # The two 1e-5 are the authors': the last layer still forgets a little, and a single layer divides by no zero.
        depth = 1 - self.layer_index / (self.num_layers - 1 + 1e-5) + 1e-5
        return self.own(-depth * torch.exp2(-8 * h / heads))

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        return {"num_heads": num_heads, "head_size": head_size}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        q, k = F.silu(q), F.silu(k)
        if self.silu_values:
            v = F.silu(v)
        if self.lrpe is not None:
            positions = token_positions(
                x.shape[1], None if state is None else state["position"], cu_seqlens, device=x.device
            )
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        o = recur(q, k, v, self.log_decay(x), scale=1.0, state=state, cu_seqlens=cu_seqlens)
        if self.lrpe is not None and state is not None:
            advance(x, state, cu_seqlens)
        gate = self.gate_proj(x)
        if self.gate == "sigmoid":
            gate = torch.sigmoid(gate)
        return self.norm(o.flatten(2)) * gate
