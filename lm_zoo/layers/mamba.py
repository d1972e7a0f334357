"""Mamba: a diagonal state space that each token tells how far to step, what to write and what to read."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels import selective_scan, selective_scan_step
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.checks import check_input, check_positive, check_size
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.init import fill_
from lm_zoo.modules.short_conv import ShortConvolution


class Mamba(Mixer):
    r"""Mamba (Gu and Dao 2023, arXiv 2312.00752).

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = W_out ((h_t C_t + D u_t) * silu(z_t))    per channel of u
        [u, z] = W_in x       u <- silu(conv(u) + bias)       A = -exp(A_log)
        [r, B, C] = W_x u     dt = softplus(W_dt r + b_dt)

    h_t has N numbers for each of the channels. The weights are laid out as in the authors' code, and as there dt_t B_t
    stands for the paper's exact discretization of B.

    Args:
        hidden_size: D, size of the input and the output.
        expand: channels of u, relative to D.
        state_size: N.
        dt_rank: size of r; D / 16, rounded up, if not given.
        conv_size: tokens that the convolution sees.

    The state is h `[B, channels, N]` in float32 and the last inputs of the convolution, whatever the length of the
    text.
    """

    paper = "Gu and Dao 2023, arXiv 2312.00752"
    equation = "h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t"
    decay = "per channel and state"
    update = "elementwise"

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: float = 2.0,
        state_size: int = 16,
        dt_rank: int | None = None,
        conv_size: int = 4,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        dt_rank = -(-hidden_size // 16) if dt_rank is None else dt_rank
        for name, value in (("state_size", state_size), ("dt_rank", dt_rank), ("conv_size", conv_size)):
            check_size(name, value)
        check_positive("expand", expand)
        channels = int(hidden_size * expand)
        if channels != hidden_size * expand:
            raise ValueError(
                f"expand = {expand} makes hidden_size = {hidden_size} to {hidden_size * expand:g} channels: change one "
                f"of them"
            )
        self.hidden_size = hidden_size
        self.channels = channels
        self.state_size = state_size
        self.dt_rank = dt_rank
        self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=False)
        self.conv = ShortConvolution(channels, conv_size, bias=True)
        self.x_proj = nn.Linear(channels, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(channels, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the authors' code: A_n = -n, and dt log-uniform in [0.001, 0.1]."""
        place = {"device": self.A_log.device, "dtype": torch.float32}
        fill_(self.A_log, torch.arange(1, self.state_size + 1, **place).log())
        nn.init.ones_(self.D)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty(self.channels, **place).uniform_(math.log(0.001), math.log(0.1)).exp()
        fill_(self.dt_proj.bias, dt + (-torch.expm1(-dt)).log())  # the inverse of softplus, exact also for small dt

    def cut(self) -> Cut:
        """Channel by channel; every rank holds all of W_in, and r, B and C are summed over the ranks."""
        return Cut(
            columns=("conv", "dt_proj", "A_log", "D"),
            row="out_proj",
            sections={"in_proj": (self.channels, self.channels)},
            sums=("x_proj",),
            counts=("channels", "conv.channels"),
        )

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        shape = (batch_size, self.channels, self.state_size)
        h = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return LayerState({"h": h, "conv": self.conv.init_state(batch_size, device, dtype)})

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(u, state, cu_seqlens)
        r, B, C = self.x_proj(u).split((self.dt_rank, self.state_size, self.state_size), dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        # The bias, whose softplus is as small as 0.001, is added in float32: bfloat16 would round dt by up to a few %.
        dt = F.softplus(F.linear(r, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        A = -self.A_log.to(wide).exp()
        return self.out_proj(scan(u, dt, A, B, C, self.D, z, state, cu_seqlens))


@along_time("u", gate="z")
def scan(u, dt, A, B, C, D, z, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
    """`selective_scan` that continues from `state["h"]` and leaves the final state there."""
    if state is None:
        return selective_scan(u, dt, A, B, C, D, z, cu_seqlens=cu_seqlens)[0]
    if state.journal is not None:
        state.record("h", lambda u, dt, B, C, z, state: scan(u, dt, A, B, C, D, z, state, None), u, dt, B, C, z)
    if u.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        u, dt, B, C, z = (tensor[:, 0] for tensor in (u, dt, B, C, z))
        return selective_scan_step(u, dt, A, B, C, D, z, state.writable("h"))[:, None]
    # With gradients the op saves its initial state, which the write below would overwrite: hand it a copy.
    initial = state["h"].clone() if torch.is_grad_enabled() else state["h"]
    y, final = selective_scan(
        u, dt, A, B, C, D, z, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens
    )
    state.write("h", final)
    return y
