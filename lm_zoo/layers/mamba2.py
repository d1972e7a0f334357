"""Mamba-2: a selective state space whose state forgets at one rate per head, which makes it linear attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_flag, check_input, check_positive, check_size, expanded
from lm_zoo.layers.qkv import QKVMixer
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.decay import SoftplusDecay, running_sign, stretched
from lm_zoo.modules.norm import RMSNorm
from lm_zoo.modules.short_conv import ShortConvolution


class Mamba2(QKVMixer):
    r"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

        S_t = a_t S_{t-1} + B_t (dt_t x_t)^T       o_t = S_t^T C_t + D x_t       a_t = exp(-exp(A_log) dt_t)    per head
        [z, x, B, C, dt] = W_in u                  [x, B, C] <- silu(conv([x, B, C]) + bias)
        dt <- softplus(dt + dt_bias)               y_t = W_out norm(o_t * silu(z_t))

    In the terms of linear attention q = C, k = B, v = dt x. B and C are shared by the heads of a group; the norm is an
    RMS norm over the channels of a group. The weights are laid out as in the authors' code.

    With negative eigenvalues a_t = 2 exp(-exp(A_log) dt_t) - 1, between -1 and 1 (Grazzi et al. 2024, arXiv 2411.12537,
    who do this to Mamba). The op wants a positive decay, so the signs go where they cost nothing: with s_t the product
    of sign(a) up to t, S'_t = s_t S_t obeys S'_t = |a_t| S'_{t-1} + B_t (s_t dt_t x_t)^T, and o_t = s_t S'_t^T C_t +
    D x_t. The state then holds S', and the sign in its count of flips.

    Args:
        hidden_size: D, size of the input and the output.
        expand: channels of x over all heads, relative to D.
        head_size: V, channels of x per head.
        state_size: K, channels of B and C.
        num_groups: G, heads of B and C.
        conv_size: tokens that the convolution sees.
        dt_limit: least and greatest dt.
        allow_negative_eigenvalues: see above. What counts modulo two, as parity does, needs it.
        norm_eps: epsilon of the norm.

    The state is one float32 matrix `[B, HV, K, V]` and the last inputs of the convolution, whatever the length of the
    text.
    """

    paper = "Dao and Gu 2024, arXiv 2405.21060"
    equation = "S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T"
    decay = "per token"
    update = "additive"
    projections = ("in_proj", "out_proj")

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: float = 2.0,
        head_size: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "head_size": head_size, "state_size": state_size}
        for name, value in (sizes | {"num_groups": num_groups, "conv_size": conv_size}).items():
            check_size(name, value)
        check_flag("allow_negative_eigenvalues", allow_negative_eigenvalues)
        check_positive("expand", expand)
        check_positive("norm_eps", norm_eps)
        inner = expanded(hidden_size, expand)
        if inner % head_size:
            raise ValueError(
                f"head_size = {head_size} does not divide the {inner:g} channels of expand * hidden_size = {expand} * "
                f"{hidden_size}: change one of the three"
            )
        inner = int(inner)
        self.hidden_size = hidden_size
        self.num_heads = inner // head_size
        if self.num_heads % num_groups:
            raise ValueError(f"num_groups must divide the {self.num_heads} heads, got {num_groups}")
        self.head_size = head_size
        self.state_size = state_size
        self.num_groups = num_groups
        self.dt_limit = check_limits("dt_limit", dt_limit)
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.inner_sizes = (inner, num_groups * state_size, num_groups * state_size)
        self.in_proj = nn.Linear(hidden_size, inner + sum(self.inner_sizes) + self.num_heads, bias=False)
        self.conv = ShortConvolution(sum(self.inner_sizes), conv_size, bias=True)
        self.log_decay = SoftplusDecay(self.num_heads)
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedGroupNorm(inner, num_groups, eps=norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.D)

    def cut(self) -> Cut | None:
        """By groups, whose heads share B, C and the norm; one group is not cut. Every rank holds all of W_in."""
        if self.num_groups == 1:
            return None
        return Cut(
            columns=("log_decay", "D", "norm"),
            row="out_proj",
            sections={"in_proj": (self.inner_sizes[0], *self.inner_sizes, self.num_heads), "conv": self.inner_sizes},
            counts=("num_groups", "num_heads", "inner_sizes", "conv.channels", "norm.groups"),
        )

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        S = recurrent_state(batch_size, self.num_heads, self.state_size, self.head_size, device, dtype)
        tensors = {"S": S, "conv": self.conv.init_state(batch_size, device, dtype)}
        if self.allow_negative_eigenvalues:
            tensors["flips"] = torch.zeros(batch_size, self.num_heads, dtype=torch.int64, device=device)
        return LayerState(tensors)

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        z, mixed, dt = self.in_proj(x).split((self.inner_sizes[0], sum(self.inner_sizes), self.num_heads), dim=-1)
        return self.out_proj(self._mix(mixed, z, dt, state, cu_seqlens))

    @classmethod
    def sizes(cls, hidden_size: int, num_heads: int, head_size: int) -> dict[str, Any]:
        expand = num_heads * head_size / hidden_size
        return {"expand": expand, "head_size": head_size, "state_size": head_size, "num_groups": num_heads}

    @classmethod
    def between_projections(cls, hidden_size: int, num_heads: int, head_size: int, **options: Any) -> "Mamba2":
        layer = super().between_projections(hidden_size, num_heads, head_size, **options)
        layer.gate_proj = nn.Linear(hidden_size, layer.inner_sizes[0], bias=False)
        layer.dt_proj = nn.Linear(hidden_size, layer.num_heads, bias=False)
        return layer

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self._mix(torch.cat([v, k, q], dim=-1), self.gate_proj(x), self.dt_proj(x), state, cu_seqlens)

    def _mix(self, mixed, z, dt, state, cu_seqlens) -> Tensor:
        v, k, q = self.conv(mixed, state, cu_seqlens).split(self.inner_sizes, dim=-1)
        v = v.unflatten(-1, (self.num_heads, -1))
        k, q = (u.unflatten(-1, (self.num_groups, -1)) for u in (k, q))
        dt = self.log_decay.time_step(dt).clamp(*self.dt_limit)
        return self.norm(self._read(q, k, v, dt, state, cu_seqlens).flatten(2), z)

    @along_time("x")
    def _read(self, q, k, x, dt, state, cu_seqlens) -> Tensor:
        """o of the recurrence above, `[B, T, H, V]`."""
        log_decay, sign = self.log_decay.of(dt), None
        write = (dt[..., None] * x).to(x.dtype)
        if self.allow_negative_eigenvalues:
            log_decay, negative = stretched(log_decay)
            sign = running_sign(negative, state, cu_seqlens)[..., None].to(x.dtype)
            write = write * sign
        o = recur(q, k, write, log_decay, scale=1.0, state=state, cu_seqlens=cu_seqlens)
        if sign is not None:
            o = o * sign
        return torch.addcmul(o, x, self.D.to(x.dtype)[:, None])


class GatedGroupNorm(RMSNorm):
    """norm(x * silu(gate)), over each of `groups` equal parts of the channels; unlike `RMSNorm`, gated before."""

    def __init__(self, size: int, groups: int, *, eps: float):
        super().__init__(size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = (x.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2)
        return (y * self.weight.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, groups={self.groups}, eps={self.eps}"


def check_limits(name: str, value: object) -> tuple[float, float]:
    """Two numbers, 0 <= least < greatest."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(x, int | float) for x in value):
        raise TypeError(f"{name} must be two numbers, the least and the greatest, got {value!r}")
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"{name} must be 0 <= least < greatest, got {value!r}")
    return tuple(value)
