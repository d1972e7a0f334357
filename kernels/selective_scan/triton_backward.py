"""The backward pass of the selective scan in Triton; `triton_scan.py` says how it goes and what it holds.

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        d(dt_t A) = g_t exp(dt_t A) h_{t-1}

Neither h_{t-1} nor what comes back from the next token is there to be read: both are scans that leave out their own
token, so a tile takes the exponentials once and no state is divided, or found as a difference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_scan.chunks import cut
from lm_zoo.kernels.linear_scan.triton_tiles import locate_chunk
from lm_zoo.kernels.selective_scan.triton_scan import (
    BACKWARD,
    LOG2_E,
    Tile,
    carry,
    load_A,
    load_border,
    load_tokens,
    options,
    places,
    plain,
    state_offsets,
    summarize,
    transpose_states,
)
from lm_zoo.kernels.triton_kernel import kernel

GROUP = 256  # channels that a program goes through, adding up their dB and dC


def selective_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, dt, A, B, C, D, z, initial_state)
    dy, x, dt, A, B, C, D, z = map(plain, (dy, x, dt, A, B, C, D, z))
    tile = _tile(A)
    chunks = cut(x.shape[0], x.shape[1], cu_seqlens, tile.tokens)
    first_state, dlast_state = transpose_states(initial_state), transpose_states(dfinal_state)
    states, products = summarize(dt, A, B, x, None, chunks, tile, CHUNK=tile.tokens, BACKWARD=False)
    carry(states, products, first_state, chunks, REVERSE=False)
    dstates, products = summarize(dt, A, C, dy, z, chunks, tile, CHUNK=tile.tokens, BACKWARD=True)
    carry(dstates, products, dlast_state, chunks, REVERSE=True)

    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dz = None if z is None else torch.empty_like(z)
    groups = triton.cdiv(A.shape[0], GROUP)
    dB, dC = (B.new_empty(groups, *B.shape, dtype=torch.float32) for _ in range(2))
    dA = products  # read for the last time
    dD = None if D is None else x.new_empty(chunks.count, A.shape[0], dtype=torch.float32)
    dfirst_state = None
    if initial_state is not None:
        dfirst_state = torch.zeros_like(first_state) if dlast_state is None else dlast_state.clone()
    backward_kernel[(chunks.count * groups,)](
        x, dt, A, B, C, D, z, dy, states, dstates, first_state, dlast_state, dx, ddt, dA, dB, dC, dD, dz, dfirst_state,
        x.shape[0] * x.shape[1], *places(x, A, chunks), GROUP=GROUP, **options(A, tile),
    )  # fmt: skip
    dD = None if D is None else dD.sum(0)
    dinitial_state = None if initial_state is None else dfirst_state.mT
    gradients = (dx, ddt, dA.sum(0).mT, dB.sum(0), dC.sum(0), dD, dz, dinitial_state)
    return tuple(
        x.new_empty(0) if of is None else gradient.to(of.dtype).contiguous()
        for of, gradient in zip(inputs, gradients, strict=True)
    )


def _tile(A: Tensor) -> Tile:
    return next(tile for size, tile in BACKWARD.items() if A.shape[1] <= size)


@triton.jit
def compose_before(a1, x1, b1, p1, a2, x2, b2, p2):
    """Maps of two stretches of tokens, h -> a h + x, and of the stretches without their last token, h -> b h + p."""
    return a1 * a2, a2 * x1 + x2, a1 * b2, b2 * x1 + p2


@triton.jit
def scan_before(decay, x, border, REVERSE: tl.constexpr):
    """The state before each token of a tile, where that before the first is `border`; with REVERSE, after each."""
    first: tl.constexpr = x.shape[0] - 1 if REVERSE else 0
    at_border = tl.arange(0, x.shape[0])[:, None, None] == first
    x += tl.where(at_border, decay * border[None, :, :], 0.0)
    one = tl.full(x.shape, 1.0, tl.float32)
    zero = tl.zeros(x.shape, tl.float32)
    _a, _x, _b, state = tl.associative_scan((decay, x, one, zero), 0, compose_before, reverse=REVERSE)
    return tl.where(at_border, border[None, :, :], state)


@kernel
def backward_kernel(
    x, dt, A, B, C, skip, z, dy, states, dstates, first_state, dlast_state,
    dx, ddt, dA, dB, dC, dskip, dz, dfirst_state,
    tokens, T, D, N, cu_seqlens, sequence_of, first_chunk,
    GROUP: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk of one tile, for a group of channels: dA `[chunks, N, D]` and dD `[chunks, D]` of every
    chunk, dB and dC `[groups, tokens, N]` of every group, to be summed in the end.
    """
    groups = tl.cdiv(D, GROUP)
    chunk = tl.program_id(0) // groups
    group = tl.cast(tl.program_id(0) % groups, tl.int64)
    n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, TILE)
    i = place * TILE + tl.arange(0, TILE)[:, None]
    token = first + i
    number = tl.arange(0, STATES)[None, :]
    weighted = (i < length) & (number < N)
    is_first, is_last = place == 0, place * TILE + TILE >= length
    before, after = chunk - tl.where(is_first, 0, 1), chunk + tl.where(is_last, 0, 1)
    # Summed over channels once, in the end: what a lane adds up until then is its own.
    B_sum = tl.zeros((TILE, STATES, BLOCK), tl.float32)
    C_sum = tl.zeros((TILE, STATES, BLOCK), tl.float32)
    for begin in range(0, GROUP, BLOCK):
        channel = group * GROUP + begin + tl.arange(0, BLOCK)[None, :]
        mask = (i < length) & (channel < D)
        offsets, inside = state_offsets(D, N, channel, STATES)
        at = tl.cast(chunk, tl.int64) * N * D + offsets
        rates = load_A(A, D, N, channel, STATES)
        write_weight = load_tokens(B, token, N, number, weighted)[:, :, None]
        read_weight = load_tokens(C, token, N, number, weighted)[:, :, None]
        steps = load_tokens(dt, token, D, channel, mask)
        value = load_tokens(x, token, D, channel, mask)
        dout = load_tokens(dy, token, D, channel, mask)

        decay = tl.exp2(steps[:, None, :] * (rates * LOG2_E)[None, :, :])
        write = (steps * value)[:, None, :] * write_weight
        border = load_border(states, first_state, before, n, is_first, offsets, inside, N * D)
        kept = decay * scan_before(decay, write, border, False)
        h = kept + write
        dvalue = tl.zeros((TILE, BLOCK), tl.float32)
        if skip is not None:
            through = tl.load(skip + channel, mask=channel < D, other=0.0).to(tl.float32)
        if z is not None:
            gate = load_tokens(z, token, D, channel, mask)
            sigmoid = tl.sigmoid(gate)
            out = tl.sum(h * read_weight, axis=1)
            if skip is not None:
                out += through * value
            dgate = dout * out * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(dz + token * D + channel, dgate, mask=mask)
            dout *= gate * sigmoid
        if skip is not None:
            dvalue += through * dout
            tl.store(
                dskip + tl.cast(chunk, tl.int64) * D + channel,
                tl.sum(dout * value, axis=0, keep_dims=True), mask=channel < D,
            )  # fmt: skip
        C_sum += h * dout[:, None, :]

        dh = read_weight * dout[:, None, :]
        border = load_border(dstates, dlast_state, after, n, is_last, offsets, inside, N * D)
        dh += scan_before(decay, decay * dh, border, True)
        dexponent = dh * kept
        dwrite = tl.sum(dh * write_weight, axis=1)
        B_sum += dh * (steps * value)[:, None, :]
        dsteps = tl.sum(dexponent * rates[None, :, :], axis=1) + dwrite * value
        tl.store(ddt + token * D + channel, dsteps, mask=mask)
        tl.store(dx + token * D + channel, dvalue + dwrite * steps, mask=mask)
        tl.store(dA + at, tl.sum(dexponent * steps[:, None, :], axis=0), mask=inside)
        if dfirst_state is not None:
            row = tl.arange(0, TILE)[:, None, None]
            dborder = tl.sum(tl.where(row == 0, decay * dh, 0.0), axis=0)
            here = (tl.arange(0, STATES)[:, None] < tl.where(is_first, N, 0)) & (channel < D)
            tl.store(dfirst_state + n * N * D + offsets, dborder, mask=here)
    at = (group * tokens + token) * N + number
    tl.store(dB + at, tl.sum(B_sum, axis=2), mask=weighted)
    tl.store(dC + at, tl.sum(C_sum, axis=2), mask=weighted)
