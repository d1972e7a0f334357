"""S4D: a diagonal state space that does not change with the input, so that training is one long convolution."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.kernels.checks import check_option
from lm_zoo.kernels.sequence_parallel import active_group, refuse_steps
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, Mixer
from lm_zoo.layers.checks import check_input, check_size
from lm_zoo.modules.diagonal_ssm import convolve, scan_texts
from lm_zoo.modules.init import fill_


class S4D(Mixer):
    r"""S4D (Gu et al. 2022, arXiv 2206.11893).

        h_t = exp(dt A) h_{t-1} + B x_t        s_t = 2 Re(C h_t) + D x_t        per channel
        B = (exp(dt A) - 1) / A                y_t = u_t * sigmoid(w_t)         [u, w] = W_o gelu(s_t) + b_o

    h_t has N / 2 complex numbers for each channel, which with their conjugates make N; A, C, D and dt are learned. At
    first A_n = -1/2 + i pi n (S4D-Lin), or A_n = -(n + 1) (S4D-Real), n = 0 .. N / 2 - 1. Trained as one convolution by
    FFT, whose rounding errors are relative to the largest value of the text; with a state or packed documents it goes
    by blocks.

    Args:
        hidden_size: D, size of the input and the output.
        state_size: N, even.
        initialization: of A, "lin" or "real".

    The state is h `[B, D, N / 2]` in complex64, whatever the length of the text.
    """

    paper = "Gu et al. 2022, arXiv 2206.11893"
    equation = "h_t = exp(dt A) h_{t-1} + B x_t"
    decay = "constant per channel and state"
    update = "elementwise"

    def __init__(self, hidden_size: int, *, state_size: int = 64, initialization: str = "lin"):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("state_size", state_size)
        if state_size % 2:
            raise ValueError(f"state_size must be even, for pairs of conjugates, got {state_size}")
        check_option("initialization", initialization, ("lin", "real"))
        self.hidden_size = hidden_size
        self.initialization = initialization
        shape = (hidden_size, state_size // 2)
        self.log_dt = nn.Parameter(torch.empty(hidden_size))
        self.A_log = nn.Parameter(torch.empty(shape))  # of -Re A
        self.A_imaginary = nn.Parameter(torch.empty(shape))
        self.C = nn.Parameter(torch.empty(*shape, 2))  # real and imaginary part
        self.D = nn.Parameter(torch.empty(hidden_size))
        self.o_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the authors' code: dt log-uniform in [0.001, 0.1], C and D normal, |C| of variance 1."""
        n = torch.arange(self.A_log.shape[1], device=self.A_log.device, dtype=torch.float32)
        lin = self.initialization == "lin"
        fill_(self.A_log, torch.full_like(n, math.log(0.5)) if lin else (n + 1).log())
        fill_(self.A_imaginary, math.pi * n if lin else torch.zeros_like(n))
        nn.init.uniform_(self.log_dt, math.log(0.001), math.log(0.1))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        device, dtype = self._placement(device, dtype)
        dtype = torch.promote_types(dtype, torch.complex64)
        return LayerState({"h": torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=dtype)})

    def discrete(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """a = dt A in float64 where there is one, B and C in the complex `dtype`, all `[D, N / 2]`."""
        wide = torch.float32 if self.C.device.type == "mps" else torch.float64
        A = torch.complex(-self.A_log.to(wide).exp(), self.A_imaginary.to(wide))
        a = self.log_dt.to(wide).exp()[:, None] * A
        return a, ((a.exp() - 1) / A).to(dtype), torch.view_as_complex(self.C.to(wide)).to(dtype)

    def forward(self, x: Tensor, *, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        with torch.autocast(x.device.type, enabled=False):  # it would round the states' products to its dtype
            s = self._mix(x.to(torch.promote_types(x.dtype, torch.float32)), state, cu_seqlens)
        u, w = self.o_proj(F.gelu(s).to(x.dtype)).chunk(2, dim=-1)
        return u * torch.sigmoid(w)

    @along_time("x")
    def _mix(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        """s of x, both in float32 at least."""
        skip = self.D.to(x.dtype) * x
        a, b, c = self.discrete(torch.promote_types(x.dtype, torch.complex64))
        if state is None and cu_seqlens is None and active_group() is None:
            return convolve(x, a, b, c) + skip
        if state is not None and state.journal is not None:
            state.record("h", functools.partial(self._mix, cu_seqlens=None), x)
        if x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            refuse_steps("S4D's decoding")
            return _step(x[:, 0], a.exp().to(b.dtype), b, c, state.writable("h"))[:, None] + skip
        start = None if state is None else state["h"].clone()  # which is written below
        y, last = scan_texts(x, a, b, c, start, cu_seqlens, output_final_state=state is not None)
        if state is not None:
            state.write("h", last)
        return y + skip


def _step(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """2 Re(C h) of x `[B, D]`, in real numbers: a compiler of tensor operations knows no others."""
    straight, crossed = torch.stack([decay.real] * 2, dim=-1), torch.stack([-decay.imag, decay.imag], dim=-1)
    b, c, h = (_flat(torch.view_as_real(y)) for y in (b, c.conj().resolve_conj(), h))
    swapped = h.index_select(-1, torch.arange(h.shape[-1], device=h.device) ^ 1)  # each imaginary part first
    h.mul_(_flat(straight)).addcmul_(swapped, _flat(crossed)).addcmul_(b, x[..., None])
    return 2 * (h * c).sum(dim=-1)


def _flat(x: Tensor) -> Tensor:
    """`[..., N / 2, 2]` as `[..., N]`, in the same memory."""
    return x.view(*x.shape[:-2], -1)
