"""HGRN: an elementwise recurrence whose forget gates are bounded from below, the more so the deeper the layer."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels.linear_scan import linear_scan, linear_scan_step
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.checks import check_flag, check_index, check_input, check_positive, check_size
from lm_zoo.modules.cut import Cut
from lm_zoo.modules.init import fill_
from lm_zoo.modules.lower_bounds import LowerBounds, bounded_gate
from lm_zoo.modules.norm import RMSNorm


class HGRN(Mixer):
    r"""HGRN (Qin, Yang and Zhong 2023, arXiv 2311.04823).

        h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_i x_t)         f_t = gamma_l + (1 - gamma_l) sigmoid(W_f x_t)
        y_t = W_o (norm(h_t) * silu(W_g x_t))

    and complex, h_t = f_t e^{i theta} * h_{t-1} + (1 - f_t) * (silu(W_i x_t) + i silu(W_j x_t)) with a learned phase
    theta per channel, at first 10000^{-2d/D}; norm and gate then see [Re h, Im h]. The lower bounds gamma_l of layer l
    rise over the depth; all layers of a model share the `LowerBounds` that make them (`share`). A layer on its own has
    gamma = 0. Unlike in the paper, the norm is an RMS norm and the projections have no biases.

    Args:
        hidden_size: D, size of the input, the output and the state.
        complex: whether the state is complex, as in the paper's language models.
        layer_index, num_layers: l and how many layers there are; the model gives them.
        norm_eps: epsilon of the norm.

    The state is h `[B, D]` in float32 or complex64, whatever the length of the text.
    """

    paper = "Qin, Yang and Zhong 2023, arXiv 2311.04823"
    equation = "h_t = f_t * h_{t-1} + (1 - f_t) * i_t"
    decay = "per channel"
    update = "elementwise"

    def __init__(
        self,
        hidden_size: int,
        *,
        complex: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_flag("complex", complex)
        check_index("layer_index", layer_index, "num_layers", num_layers)
        check_positive("norm_eps", norm_eps)
        self.hidden_size = hidden_size
        self.complex = complex
        self.layer_index = layer_index
        width = 2 * hidden_size if complex else hidden_size
        self.f_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.i_proj = nn.Linear(hidden_size, width, bias=False)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.norm = RMSNorm(width, eps=norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.theta = nn.Parameter(torch.empty(hidden_size)) if complex else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.theta is not None:
            channels = torch.arange(self.hidden_size, device=self.theta.device, dtype=torch.float32)
            fill_(self.theta, 10000.0 ** (-2 / self.hidden_size * channels))

    def cut(self) -> Cut | None:
        """Channel by channel; complex numbers, whose parts lie apart, are not cut."""
        columns = ("f_proj", "i_proj", "gate_proj", "norm")
        return None if self.complex else Cut(columns, norms=("norm",), counts=())

    def shared_over_depth(self, num_layers: int) -> LowerBounds:
        return LowerBounds(num_layers, self.hidden_size)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        dtype = torch.promote_types(dtype, torch.complex64 if self.complex else torch.float32)
        channels = self.hidden_size // self.ranks
        return LayerState({"h": torch.zeros(batch_size, channels, device=device, dtype=dtype)})

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        z, i, gate = self.f_proj(x), F.silu(self.i_proj(x)), self.gate_proj(x)
        log_f, write = bounded_gate(z, None if self.shared is None else self.own(self.shared(self.layer_index)))
        f = log_f.exp()
        if not self.complex:
            h = scan(write * i, f, state, cu_seqlens)
        else:
            real, imaginary = i.to(f.dtype).chunk(2, dim=-1)
            f = torch.polar(f, self.theta.to(f.dtype).expand_as(f))
            h = scan(torch.complex(write * real, write * imaginary), f, state, cu_seqlens)
            h = torch.cat([h.real, h.imag], dim=-1)
        return self.o_proj(self.norm(h, gate).to(i.dtype))


@along_time("x")
def scan(x: Tensor, decay: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
    """`linear_scan` that continues from `state["h"]` and leaves the final state there."""
    if state is None:
        return linear_scan(x, decay, cu_seqlens=cu_seqlens)[0]
    if state.journal is not None:
        state.record("h", functools.partial(scan, cu_seqlens=None), x, decay)
    if x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        return linear_scan_step(x[:, 0], decay[:, 0], state.writable("h"))[:, None]
    # With gradients the op saves its initial state, which the write below would overwrite: hand it a copy.
    initial = state["h"].clone() if torch.is_grad_enabled() else state["h"]
    h, final = linear_scan(x, decay, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens)
    state.write("h", final)
    return h
