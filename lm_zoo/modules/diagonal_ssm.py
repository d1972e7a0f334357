r"""A time-invariant diagonal state space, with M complex numbers of state for each of D channels.

    h_t = exp(a) h_{t-1} + b u_t        y_t = 2 Re(sum_m c h_t)        a, b, c: [D, M], complex, Re a < 0

Without an earlier state and borders it is one convolution with k_l = 2 Re(sum_m c b exp(l a)), by FFT. With them it
goes by blocks of 64 tokens: convolutions within, and the states from block to block by `linear_scan`.

`a` comes in float64 where there is one: its multiples are angles of many turns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds
from lm_zoo.kernels.linear_scan import linear_scan
from lm_zoo.kernels.sequence_parallel import Carry, Product, Segment, SequenceGroup, active_group, alone

BLOCK = 64


def convolve(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y of u `[B, T, D]`, from state 0."""
    length = u.shape[1]
    kernel = respond(b[:, None], a, c, length)[:, 0]  # [D, T]
    spectrum = torch.fft.rfft(u, n=2 * length, dim=1) * torch.fft.rfft(kernel.T, n=2 * length, dim=0)
    return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]


def respond(h: Tensor, a: Tensor, c: Tensor, length: int) -> Tensor:
    """2 Re(sum_m c exp(l a) h) for l = 0 .. length - 1 of the states h `[D, R, M]`: `[D, R, length]`.

    With l = i s + j, exp(i s a) is taken to h and exp(j a) to c, so that no tensor has all of D, M and l.
    """
    size = int(length**0.5) + 1
    steps = torch.arange(size, device=a.device)
    coarse = (a[:, None] * (steps * size)[:, None]).exp().to(h.dtype)  # [D, size, M]
    fine = 2 * c[:, None] * (a[:, None] * steps[:, None]).exp().to(h.dtype)
    h = (h[:, :, None] * coarse[:, None]).flatten(1, 2)  # [D, R size, M]
    y = torch.view_as_real(h).flatten(2) @ torch.view_as_real(fine.conj().resolve_conj()).flatten(2).mT
    return y.unflatten(1, (-1, size)).flatten(2)[..., :length]


def scan_texts(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """y of u `[B, T, D]`, or of N texts packed along time, and their last states `[B or N, D, M]` if asked for.

    Each text goes on from its own state in `start`, from 0 if not given.
    """
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    start = b.new_zeros(rows, *b.shape) if start is None else start
    if (group := active_group()) is not None:
        return _scan_segment(u, a, b, c, start, cu_seqlens, group, output_final_state)
    if cu_seqlens is None:  # a batch is packed sequences of one length
        cu_seqlens = torch.arange(u.shape[0] + 1, device=u.device) * u.shape[1]
    y, last = scan_blocks(u.flatten(0, 1)[None], a, b, c, start, cu_seqlens)
    return y.view_as(u), last if output_final_state else None


@torch.compiler.disable
def _scan_segment(u, a, b, c, start, cu_seqlens, group: SequenceGroup, output_final_state: bool):
    """The same for a segment of u: its own y, and what the state that enters it adds."""
    segment = Segment(group, u.shape[1], cu_seqlens, u.device)
    with alone():
        y, last = scan_texts(u, a, b, c, segment.own(start), segment.cu_seqlens, output_final_state=True)
    decay = (a * segment.length).exp().to(b.dtype)[None]
    decay = decay * segment.whole() if segment.packed else decay
    S_in = Carry(group, decay, segment.leaving(last), segment.start_of(start), Product).arrive()
    carried = respond((S_in * a.exp().to(b.dtype)).transpose(0, 1), a, c, segment.length).permute(1, 2, 0)
    lengths = segment.length
    if segment.packed:  # the text that goes on ends where the first one starts
        carried = carried * (segment.first.cumsum(0) == 0)[:, None]
        lengths = segment.cu_seqlens.diff()[:, None, None]
    last = last + segment.entering(S_in, torch.zeros_like(last)) * (a * lengths).exp().to(b.dtype)
    return y + carried, segment.final(last) if output_final_state else None


def scan_blocks(u: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """y of N sequences packed in u `[1, T, D]`, each from its own state in `start` `[N, D, M]`, and their last states.

    Every sequence is cut into blocks; its last one may be short. No shape depends on where the borders are.
    """
    length, (count, channels, _) = u.shape[1], start.shape
    if u.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would stall the device
        check_bounds(cu_seqlens.tolist(), length)
    borders = F.pad(((cu_seqlens.diff() + BLOCK - 1) // BLOCK).cumsum(dim=0), (1, 0))  # [N + 1], in blocks
    blocks = length // BLOCK + count  # at least so many; the rest are empty, and a sequence of their own
    borders = F.pad(borders, (0, 1), value=blocks)

    tokens = torch.arange(length, device=u.device)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1  # `right`: empty sequences own no token
    slots = tokens - cu_seqlens[sequence] + borders[sequence] * BLOCK
    filled = torch.zeros(blocks, dtype=torch.int64, device=u.device).index_add(
        0, slots // BLOCK, torch.ones_like(slots)
    )

    def lay_out(slots: Tensor) -> Tensor:  # [blocks, BLOCK, D]
        return u.new_zeros(blocks * BLOCK, channels).index_copy(0, slots, u[0]).unflatten(0, (blocks, BLOCK))

    # What a block writes: its tokens stand at its end, the last one with exponent 0. [blocks, D, M]
    decay = (a * filled[:, None, None]).exp().to(b.dtype)
    ages = torch.arange(BLOCK - 1, -1, -1, device=u.device)
    reach = b[:, None] * (a[:, None] * ages[:, None]).exp().to(b.dtype)  # [D, BLOCK, M]
    at_end = lay_out(slots + BLOCK - filled[slots // BLOCK])
    written = torch.view_as_complex(
        (at_end.permute(2, 0, 1) @ torch.view_as_real(reach).flatten(2)).unflatten(2, (-1, 2))
    )
    after, last = linear_scan(
        written.transpose(0, 1).flatten(1)[None],
        decay.flatten(1)[None],
        initial_state=F.pad(start.flatten(1), (0, 0, 0, 1)),
        output_final_state=True,
        cu_seqlens=borders,
    )
    owner = torch.searchsorted(borders, torch.arange(blocks, device=u.device), right=True) - 1
    first = torch.arange(blocks, device=u.device) == borders[owner]
    start = F.pad(start, (0, 0, 0, 0, 0, 1))
    before = F.pad(after[0], (0, 0, 1, -1)).unflatten(1, start.shape[1:])
    before = torch.where(first[:, None, None], start[owner], before)
    carried = respond((before * a.exp().to(b.dtype)).transpose(0, 1), a, c, BLOCK)  # [D, blocks, BLOCK]
    y = convolve(lay_out(slots), a, b, c) + carried.permute(1, 2, 0)
    return y.flatten(0, 1)[slots][None], last[:count].unflatten(1, start.shape[1:])
