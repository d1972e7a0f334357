"""HGRN2: gated linear attention whose keys are what the forget gates leave, with gates bounded from below by depth."""

import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.layers.base import LayerState, Mixer, recur, recurrent_state
from lm_zoo.layers.checks import check_index, check_input, check_positive, check_size
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.lower_bounds import LowerBounds, bounded_gate
from lm_zoo.modules.norm import RMSNorm


class HGRN2(Mixer):
    r"""HGRN2 (Qin et al. 2024, arXiv 2404.07904).

        S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_t^T       o_t = S_t^T silu(W_q x_t)                      per head
        f_t = gamma_l + (1 - gamma_l) sigmoid(W_f x_t)  i_t = W_i x_t          y_t = W_o norm(o_t)

    The lower bounds gamma_l of layer l rise over the depth; all layers of a model share the `LowerBounds` that make
    them (`share`). A layer on its own has gamma = 0. The norm is an RMS norm over all heads, as in the authors' code.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H; one for every 128 channels if not given.
        layer_index, num_layers: l and how many layers there are; the model gives them.
        norm_eps: epsilon of the norm.

    The state is one float32 matrix `[B, H, K, V]`, whatever the length of the text.
    """

    paper = "Qin et al. 2024, arXiv 2404.07904"
    equation = "S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_t^T"
    decay = "per key channel"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        *,
        layer_index: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        num_heads = max(1, hidden_size // 128) if num_heads is None else num_heads
        check_size("num_heads", num_heads)
        check_index("layer_index", layer_index, "num_layers", num_layers)
        check_positive("norm_eps", norm_eps)
        if hidden_size % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide hidden_size = {hidden_size}: change one of them")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.layer_index = layer_index
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.f_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "f_proj", "i_proj", "norm"), norms=("norm",))

    def shared_over_depth(self, num_layers: int) -> LowerBounds:
        return LowerBounds(num_layers, self.hidden_size)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        S = recurrent_state(batch_size, self.num_heads, self.head_size, self.head_size, device, dtype)
        return LayerState({"S": S})

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        q, z, i = F.silu(self.q_proj(x)), self.f_proj(x), self.i_proj(x)
        log_f, k = bounded_gate(z, None if self.shared is None else self.own(self.shared(self.layer_index)))
        q, k, i, log_f = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k.to(q.dtype), i, log_f))
        o = recur(q, k, i, log_f, scale=1.0, state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(self.norm(o.flatten(2)))
