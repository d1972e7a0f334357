"""Linear attention: a kernel's features in place of softmax, with the denominator that keeps it an average."""

from typing import Any

import torch
from torch import Tensor, nn

from lm_zoo.kernels.checks import check_option
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, recurrent_state
from lm_zoo.layers.checks import check_flag, check_positive, check_size
from lm_zoo.layers.prefix import PrefixMixer, recur_prefix
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.feature_maps import FEATURE_MAPS
from lm_zoo.modules.norm import RMSNorm

EPS = 1e-6  # added to the denominator, as in Katharopoulos's code: where no feature is active, 0 / 0 becomes 0


class LinearAttention(PrefixMixer):
    r"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) with a choice of feature map phi.

        S_t = S_{t-1} + phi(k_t) v_t^T       o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-6)       per head
        z_t = z_{t-1} + phi(k_t)             y_t = W_o o_t

    and without the denominator, o_t = norm(S_t^T phi(q_t)), an RMS norm of each head (Qin et al. 2022, arXiv
    2210.10340). q, k, v = W_q x, W_k x, W_v x.

    Args:
        hidden_size: D, size of the input and the output.
        num_heads: H.
        feature_map: "elu" (elu + 1), "relu", "squared_relu", "identity", "taylor" (Based, arXiv 2402.18668), "hedgehog"
            (arXiv 2402.04347) or "t2r" (arXiv 2103.13076); the last two are learned, one for q and one for k.
        denominator: whether to divide by the sum of the weights; not with "identity", whose weights have any sign.
        head_size: K, channels of q and k per head; 16 for "taylor", else V if not given.
        value_size: V, channels of v per head; hidden_size / H if not given.
        norm_eps: epsilon of the norm of the heads where there is no denominator.

    The state is one float32 matrix `[B, H, features, V]`, whatever the length of the text; with the denominator it has
    a last column z, since v := [v, 1] makes both sums in one call. These sums do not forget: they grow with the text
    and are kept in float32, where each token adds a relative rounding error of 6e-8 at most and typically far less in
    sum, as the errors are of either sign.

    `layer(x, prefix_length=M)` lets the first M tokens see all of each other, see `PrefixMixer`.
    """

    paper = "Katharopoulos et al. 2020, arXiv 2006.16236"
    equation = "S_t = S_{t-1} + phi(k_t) v_t^T"
    decay = "none"
    update = "additive"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        feature_map: str = "elu",
        denominator: bool = True,
        head_size: int | None = None,
        value_size: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        check_option("feature_map", feature_map, tuple(FEATURE_MAPS))
        check_flag("denominator", denominator)
        if denominator and not FEATURE_MAPS[feature_map].positive:
            raise ValueError(
                f"denominator must be false with feature_map = {feature_map!r}: a sum of weights of any sign can be 0"
            )
        check_positive("norm_eps", norm_eps)
        if value_size is None and hidden_size % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide hidden_size = {hidden_size}: change one of them")
        value_size = hidden_size // num_heads if value_size is None else value_size
        check_size("value_size", value_size)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.value_size = value_size
        if head_size is None:
            head_size = 16 if feature_map == "taylor" else self.value_size
        check_size("head_size", head_size)
        self.key_size = head_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * value_size, bias=False)
        self.q_map = FEATURE_MAPS[feature_map](num_heads, head_size)
        self.k_map = FEATURE_MAPS[feature_map](num_heads, head_size)
        self.norm = None if denominator else RMSNorm(self.value_size, eps=norm_eps)
        self.o_proj = nn.Linear(num_heads * value_size, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("q_proj", "k_proj", "v_proj", "q_map", "k_map"))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        columns = self.value_size + (self.norm is None)
        return LayerState({"S": recurrent_state(batch_size, self.num_heads, self.q_map.size, columns, device, dtype)})

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        return {"num_heads": num_heads, "head_size": head_size, "value_size": head_size}

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
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        q, k = self.q_map(q), self.k_map(k)
        # All in float32: the sums of a long text overflow float16, and in bfloat16 their quotient is coarse.
        o = self._average(q, k, v.to(q.dtype), state, cu_seqlens, prefix)
        return (o if self.norm is None else self.norm(o)).flatten(2).to(v.dtype)

    @along_time("v")
    def _average(self, q, k, v, state, cu_seqlens, prefix) -> Tensor:
        """o of features q and k; without the denominator it is a sum."""
        if self.norm is not None:
            return recur_prefix(q, k, v, prefix=prefix, state=state, cu_seqlens=cu_seqlens)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o = recur_prefix(q, k, v, prefix=prefix, scale=1.0, state=state, cu_seqlens=cu_seqlens)
        return o[..., :-1] / (o[..., -1:] + EPS)
