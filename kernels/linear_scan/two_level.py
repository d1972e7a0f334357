"""The scan in two levels in PyTorch, forward and backward, on any device; quick on a CPU. `op.py` registers it.

Time is cut into chunks of sqrt(T) / 2 tokens. A first pass steps through all chunks side by side, for what each of
them adds to the state and the product of its decays; the states are then carried from chunk to chunk; a second pass
steps through all chunks again, each from its own state, and writes h. Nothing is divided by a product of decays, so
any |a| <= 1 is fine, 0 and products that underflow included, and beside h the scan needs O(sqrt(T)) memory.

The backward pass is the same scan, run the other way.
"""

import itertools
import sys
from math import isqrt

import torch
from torch import Tensor

from lm_zoo.kernels.checks import check_bounds

# Elements of one tensor that are scanned at a time, 8 MiB in float32: the second pass finds x and decay in the cache.
SEGMENT_ELEMENTS = 2**21
# Elements per token from which on stepping token by token, one pass instead of two, is quicker.
WIDE = 2**13


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def scan_(x: Tensor, decay: Tensor, state: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """Writes h_t = decay_t h_{t-1} + x_t, all `[B, T, D]` of one dtype, into h, which may be x; the last h is returned.

    `state` `[B, D]` comes before the first token, or after the last one in reverse.
    """
    length, per_token = x.shape[1], max(1, x.shape[0] * x.shape[2])
    limit = max(1, SEGMENT_ELEMENTS // per_token) if x.device.type == "cpu" else sys.maxsize
    done = 0
    while done < length:
        size = min(length - done, limit)
        # Tokens of a chunk: shorter than sqrt(size), so that a step over all chunks has work for several threads.
        run = size if per_token >= WIDE else max(1, isqrt(size) // 2)
        chunks = size // run
        size = chunks * run
        start = length - done - size if reverse else done
        segment = [tensor[:, start : start + size].unflatten(1, (chunks, run)) for tensor in (x, decay, h)]
        state = _scan_segment(*segment, state, reverse)
        done += size
    return state.clone()


def _scan_segment(x: Tensor, decay: Tensor, h: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Of chunks, `[B, chunks, tokens, D]`."""
    direction = -1 if reverse else 1
    x_steps, decay_steps, h_steps = (tensor.unbind(2)[::direction] for tensor in (x, decay, h))
    carry = state.unsqueeze(1)
    if x.shape[1] > 1:
        added, products = x_steps[0].clone(), decay_steps[0].clone()
        for x_t, decay_t in zip(x_steps[1:], decay_steps[1:], strict=True):
            torch.addcmul(x_t, decay_t, added, out=added)
            products.mul_(decay_t)
        carry = torch.empty_like(added)
        added, products, carries = (tensor.unbind(1)[::direction] for tensor in (added, products, carry))
        carries[0].copy_(state)
        for chunk, (before, after) in enumerate(itertools.pairwise(carries)):
            torch.addcmul(added[chunk], products[chunk], before, out=after)
    for x_t, decay_t, h_t in zip(x_steps, decay_steps, h_steps, strict=True):
        carry = torch.addcmul(x_t, decay_t, carry, out=h_t)
    return h[:, 0, 0] if reverse else h[:, -1, -1]


class _Ends:
    """The tokens at which the packed sequences that are not empty start and stop, in the order of the scan."""

    def __init__(self, cu_seqlens: Tensor, length: int, reverse: bool) -> None:
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, length)
        filled = [(n, start, end - 1) for n, (start, end) in enumerate(itertools.pairwise(bounds)) if start < end]
        self.sequences, first, last = torch.tensor(filled, device=cu_seqlens.device).unbind(1)
        self.first, self.last = (last, first) if reverse else (first, last)


def linear_scan_forward(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h and the final states."""
    dtype = compute_dtype(x.dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    zeros = initial_state is None
    states = x.new_zeros(rows, x.shape[2], dtype=dtype) if zeros else initial_state.to(dtype, copy=True)
    if cu_seqlens is None:
        h = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        states = scan_(x.to(dtype), decay.to(dtype), states, h, reverse)
        return h.to(x.dtype), states
    # A sequence that starts with a decay of 0 takes nothing from its neighbour; its own state goes in through x.
    ends = _Ends(cu_seqlens, x.shape[1], reverse)
    h = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    h[0, ends.first] += decay[0, ends.first] * states[ends.sequences]
    scan_(h, _cut_decay(decay, ends, dtype), torch.zeros_like(h[:, 0]), h, reverse)
    states[ends.sequences] = h[0, ends.last]
    return h.to(x.dtype), states


def _cut_decay(decay: Tensor, ends: _Ends, dtype: torch.dtype) -> Tensor:
    decay = decay.to(dtype, copy=True)
    decay[0, ends.first] = 0
    return decay


def linear_scan_backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, ddecay and dinitial_state (empty for no initial state).

        dx_t = dh_t + conj(a_{t+1}) dx_{t+1}        da_t = dx_t conj(h_{t-1})        dh_0 = conj(a_1) dx_1

    The conjugate g of dx is scanned, because it needs no conjugate of a.
    """
    dtype = compute_dtype(h.dtype)
    ends = None if cu_seqlens is None else _Ends(cu_seqlens, h.shape[1], reverse)
    start, stop = (-1, 0) if reverse else (0, -1)  # first and last token in the order of the scan
    before, after = slice(None, -1), slice(1, None)
    if reverse:
        before, after = after, before

    g = dh.to(dtype, copy=True, memory_format=torch.contiguous_format).conj_physical_()
    factors = decay.to(dtype) if ends is None else _cut_decay(decay, ends, dtype)
    if dfinal_state is not None:
        dfinal_state = dfinal_state.to(dtype).conj_physical()
        if ends is None:
            g[:, stop] += dfinal_state
        else:
            g[0, ends.last] += dfinal_state[ends.sequences]
    scan_(g[:, before], factors[:, after], g[:, stop], g[:, before], not reverse)

    ddecay = torch.empty_like(g)
    torch.mul(g[:, after], h[:, before], out=ddecay[:, after])
    # Tokens with no other before them: their gradients come from the initial state.
    first = (slice(None), start) if ends is None else (0, ends.first)
    g_first = g[first]
    state = torch.zeros_like(g_first)
    dinitial_state = h.new_empty(0)
    if initial_state is not None:
        state = initial_state.to(dtype) if ends is None else initial_state[ends.sequences].to(dtype)
        dinitial_state = decay[first] * g_first
        if ends is not None:
            kept = torch.zeros_like(initial_state, dtype=dtype) if dfinal_state is None else dfinal_state.clone()
            kept[ends.sequences] = dinitial_state
            dinitial_state = kept
        dinitial_state = dinitial_state.conj_physical().to(initial_state.dtype)
    ddecay[first] = g_first * state
    return g.conj_physical_().to(h.dtype), ddecay.conj_physical_().to(decay.dtype), dinitial_state


def linear_scan_step(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    state.mul_(decay).add_(x)
    return state.to(x.dtype, copy=True)
