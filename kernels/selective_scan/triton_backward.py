"""The backward pass of the selective scan in Triton; `triton_scan.py` says how it goes and what it holds.

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        d(dt_t A) = g_t exp(dt_t A) h_{t-1}

A tile is scanned forward for h, and for what each token keeps of the state before it, exp(dt_t A) h_{t-1}; then from
its end for g. So it takes the exponentials once, and no state is divided, or found as a difference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_scan.chunks import cut
from lm_zoo.kernels.selective_scan.triton_scan import (
    CHUNK,
    LOG2_E,
    Tile,
    carry,
    load_A,
    load_border,
    load_tokens,
    locate,
    options,
    place_of_tile,
    places,
    plain,
    state_offsets,
    summarize,
    transpose_states,
)
from lm_zoo.kernels.triton_kernel import kernel

# By the largest N, rounded up to a power of two: what fits without spills on compute capability 8.0 and 9.0.
BACKWARD = {32: Tile(8, 128, 1), 256: Tile(8, 512, 8)}
GROUP = 64  # channels that a program goes through, adding up their dB and dC


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
    tile = next(tile for size, tile in BACKWARD.items() if A.shape[1] <= size)
    dy, x, dt, A, B, C, D, z = map(plain, (dy, x, dt, A, B, C, D, z))
    chunks = cut(x.shape[0], x.shape[1], cu_seqlens, CHUNK)
    first_state, dlast_state = transpose_states(initial_state), transpose_states(dfinal_state)
    states, products, dstates, inner, elapsed = summarize(dt, A, B, x, C, dy, z, chunks, tile)
    carry(states, products, first_state, chunks, REVERSE=False)
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
        x, dt, A, B, C, D, z, dy, states, dstates, inner, elapsed, first_state, dlast_state,
        dx, ddt, dA, dB, dC, dD, dz, dfirst_state,
        x.shape[0] * x.shape[1], *places(x, A, chunks), CHUNK=CHUNK, GROUP=GROUP, **options(A, tile),
    )  # fmt: skip
    dD = None if D is None else dD.sum(0)
    dinitial_state = None if initial_state is None else dfirst_state.mT
    gradients = (dx, ddt, dA.sum(0).mT, dB.sum(0), dC.sum(0), dD, dz, dinitial_state)
    return tuple(
        x.new_empty(0) if of is None else gradient.to(of.dtype).contiguous()
        for of, gradient in zip(inputs, gradients, strict=True)
    )


@triton.jit
def compose_kept(a1, x1, k1, a2, x2, k2):
    """Maps of two stretches of tokens, h -> a h + x, and to what their last token keeps of the state before it,
    h -> a h + k."""
    return a1 * a2, a2 * x1 + x2, a2 * x1 + k2


@triton.jit
def compose_decayed(p1, g1, a1, p2, g2, a2):
    """Two stretches of g_t = x_t + a_{t+1} g_{t+1}, later tokens first: b -> p b + g, and the earliest token's a."""
    return p1 * a1 * p2, p2 * a1 * g1 + g2, a2


@triton.jit
def scan_back(decay, x, border):
    """g_t = x_t + a_{t+1} g_{t+1} of a tile, the last token first, where after it comes a g = border."""
    first = (tl.arange(0, x.shape[0]) == 0)[:, None, None]
    x = tl.where(first, x + border, x)
    one = tl.full(x.shape, 1.0, tl.float32)
    _p, g, _a = tl.associative_scan((one, x, decay), 0, compose_decayed)
    return g


@triton.jit
def sum_channels(states, values):
    """`[TILE, STATES]`, the sums over channels of states `[TILE, STATES, BLOCK]` times values `[TILE, BLOCK]`.

    With the 0 a product is rounded before lanes add theirs up. Else each would fuse its own into the sum, and they
    would differ in the last bit.
    """
    return tl.sum(states * values[:, None, :] + 0.0, axis=2)


@kernel
def backward_kernel(
    x, dt, A, B, C, skip, z, dy, states, dstates, inner, elapsed, first_state, dlast_state,
    dx, ddt, dA, dB, dC, dskip, dz, dfirst_state,
    tokens, T, D, N, cu_seqlens, sequence_of, first_chunk,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk, for a group of channels: dA `[chunks, N, D]` and dD `[chunks, D]` of every chunk, dB
    and dC `[groups, tokens, N]` of every group, to be summed in the end.
    """
    groups = tl.cdiv(D, GROUP)
    chunk = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    n, first, count, place, last = locate(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    number = tl.arange(0, STATES)[None, :]
    before, after = chunk - tl.where(place == 0, 0, 1), chunk + tl.where(last, 0, 1)
    row = tl.arange(0, TILE)[:, None]
    for block in range(0, tl.minimum(GROUP, D - group * GROUP), BLOCK):
        channel = group * GROUP + block + tl.arange(0, BLOCK)[None, :]
        offsets, inside = state_offsets(D, N, channel, STATES)
        rates = load_A(A, D, N, channel, STATES)[None, :, :] * LOG2_E
        border = load_border(states, first_state, before, n, place == 0, offsets, inside, N * D)[None, :, :]
        dstate = load_border(dstates, dlast_state, after, n, last, offsets, inside, N * D)[None, :, :]
        drates = tl.zeros((1, STATES, BLOCK), tl.float32)
        if skip is not None:
            through = tl.load(skip + channel, mask=channel < D, other=0.0).to(tl.float32)
            dthrough = tl.zeros((TILE, BLOCK), tl.float32)
        for step in range(0, count, TILE):
            begin = (count - 1 - step) // TILE * TILE
            i = begin + row
            mask = (i < count) & (channel < D)
            weighted = (i < count) & (number < N)
            at = first * D + (i * D + channel)
            weights_at = (tl.cast(group, tl.int64) * tokens + first) * N + (i * N + number)
            steps = load_tokens(dt, first, i, D, channel, mask)
            value = load_tokens(x, first, i, D, channel, mask)
            dout = load_tokens(dy, first, i, D, channel, mask)
            read = load_tokens(C, first, i, N, number, weighted)[:, :, None]
            added_up = weighted & (number < tl.where(block > 0, N, 0))
            B_sum = tl.load(dB + weights_at, mask=added_up, other=0.0)
            C_sum = tl.load(dC + weights_at, mask=added_up, other=0.0)

            tile = place_of_tile(chunk, first, begin, TILE)
            time = tl.load(elapsed + tile * D + channel, mask=channel < D, other=0.0)
            state = tl.load(inner + tile * N * D + offsets, mask=inside, other=0.0)[None, :, :]
            state += border * tl.exp2(time * rates)
            decay = tl.exp2(steps[:, None, :] * rates)
            write = (steps * value)[:, None, :] * load_tokens(B, first, i, N, number, weighted)[:, :, None]
            h = tl.where(row[:, :, None] == 0, decay * state + write, write)
            kept = tl.where(row[:, :, None] == 0, decay * state, -0.0)  # of all numbers, adding this changes none
            _decay, h, kept = tl.associative_scan((decay, h, kept), 0, compose_kept)
            if z is not None:
                gate = load_tokens(z, first, i, D, channel, mask)
                sigmoid = tl.sigmoid(gate)
                out = tl.sum(h * read, axis=1)
                if skip is not None:
                    out += through * value
                tl.store(dz + at, dout * out * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
                dout *= gate * sigmoid
            tl.store(dC + weights_at, C_sum + sum_channels(h, dout), mask=weighted)

            # From its end; a scan in reverse would exchange all it has between lanes. B is loaded again, to be there
            # when it is needed rather than in registers until then.
            g = scan_back(tl.flip(decay, 0), tl.flip(read * dout[:, None, :], 0), dstate)
            i = begin + TILE - 1 - row
            write_weight = load_tokens(B, first, i, N, number, (i < count) & (number < N))[:, :, None]
            dwrite = tl.sum(tl.flip(g * write_weight, 0), axis=1)
            g = tl.flip(g, 0)
            tl.store(dB + weights_at, B_sum + sum_channels(g, steps * value), mask=weighted)
            dexponent = g * kept
            dsteps = tl.sum(dexponent * rates, axis=1) / LOG2_E + dwrite * value
            drates += tl.sum(dexponent * steps[:, None, :], axis=0, keep_dims=True)
            dstate = tl.sum(tl.where(row[:, :, None] == 0, decay * g, 0.0), axis=0, keep_dims=True)
            dvalue = dwrite * steps
            if skip is not None:
                dvalue += through * dout
                dthrough += dout * value
            tl.store(ddt + at, dsteps, mask=mask)
            tl.store(dx + at, dvalue, mask=mask)
        tl.debug_barrier()  # other lanes may load what these have stored of dB and dC
        tl.store(dA + tl.cast(chunk, tl.int64) * N * D + offsets, tl.sum(drates, axis=0), mask=inside)
        if skip is not None:
            total = tl.sum(dthrough, axis=0, keep_dims=True)
            tl.store(dskip + tl.cast(chunk, tl.int64) * D + channel, total, mask=channel < D)
        if dfirst_state is not None:
            here = (tl.arange(0, STATES)[:, None] < tl.where(place == 0, N, 0)) & (channel < D)
            tl.store(dfirst_state + n * N * D + offsets, tl.sum(dstate, axis=0), mask=here)
