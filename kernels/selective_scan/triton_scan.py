"""The selective scan in Triton, the twin of `segmented.py`: chunks of tokens side by side.

    1 summarize   what each chunk adds to the state, and the product of its decays      (`summary_kernel`)
    2 carry       the states over the chunks of each sequence                           (`linear_scan`'s `carry_kernel`)
    3 scan        each chunk from the state before it                                   (`scan_kernel`)

Where no sequence is longer than a chunk there is the third alone. The states of a tile of tokens exist in registers
only, `[TILE, N, BLOCK]`: channels run along lanes, and time lies within a lane wherever there are more states than
lanes, so that a scan over it exchanges nothing. All exponents are <= 0.

The backward pass needs nothing but the inputs. It does 1 and 2 again, and for the gradients of the states the other
way, over chunks of one tile; then one kernel does the rest (`triton_backward.py`). Within a call it holds three buffers
of N / TILE float32 numbers per token and channel: the states after the chunks, the gradients of those before them, and
the products of decays, whose place the chunks' shares of dA take. dB and dC are sums over channels, and the shares of
the groups of channels take another 2 N / GROUP numbers per token and channel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_scan import triton_scan as linear
from lm_zoo.kernels.linear_scan.chunks import Chunks, cut
from lm_zoo.kernels.linear_scan.triton_tiles import carry_kernel, compose, locate_chunk
from lm_zoo.kernels.triton_kernel import kernel


class Tile(NamedTuple):
    """What a program has in registers at a time."""

    tokens: int
    states: int  # of a token: N of them for each of the program's channels
    warps: int


CHUNK = 128  # tokens, going forward
FORWARD = Tile(16, 256, 4)
# By the largest N, rounded up to a power of two: what fits without spills on compute capability 8.0 and 9.0. The tokens
# are a chunk, too.
BACKWARD = {16: Tile(16, 128, 4), 256: Tile(8, 256, 8)}
MAX_CHANNELS = 32  # of a program, where N is small
LOG2_E = tl.constexpr(1.4426950408889634)


def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is saved: the backward pass computes states again."""
    chunks = cut(x.shape[0], x.shape[1], cu_seqlens, CHUNK)
    x, dt, A, B, C, D, z = map(plain, (x, dt, A, B, C, D, z))
    initial_state = transpose_states(initial_state)
    shape = chunks.sequences, A.shape[1], A.shape[0]
    final_state = x.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state.clone()
    carried = None
    if chunks.per_sequence > 1:
        carried, products = summarize(dt, A, B, x, None, chunks, FORWARD, CHUNK=CHUNK, BACKWARD=False)
        carry(carried, products, initial_state, chunks, REVERSE=False)
    y = torch.empty_like(x)
    scan_kernel[grid(A, FORWARD, chunks.count)](
        x, dt, A, B, C, D, z, carried, initial_state, y, final_state, *places(x, A, chunks),
        CHUNK=CHUNK, **options(A, FORWARD),
    )  # fmt: skip
    return y, final_state.mT.contiguous(), x.new_empty(0, dtype=torch.float32)


def plain(x: Tensor | None) -> Tensor | None:
    """As the kernels read it; x itself wherever it can be."""
    return None if x is None else x.resolve_neg().contiguous()


def transpose_states(states: Tensor | None) -> Tensor | None:
    """`[rows, D, N]` to `[rows, N, D]`, as the kernels have them."""
    return None if states is None else states.mT.float().contiguous()


def options(A: Tensor, tile: Tile) -> dict:
    states = triton.next_power_of_2(A.shape[1])
    block = max(1, min(MAX_CHANNELS, tile.states // states))
    return {"TILE": tile.tokens, "STATES": states, "BLOCK": block, "num_warps": tile.warps}


def grid(A: Tensor, tile: Tile, rows: int) -> tuple[int]:
    return (rows * triton.cdiv(A.shape[0], options(A, tile)["BLOCK"]),)


def places(x: Tensor, A: Tensor, chunks: Chunks) -> tuple:
    return x.shape[1], A.shape[0], A.shape[1], chunks.cu_seqlens, chunks.sequence_of, chunks.first_chunk


def summarize(
    dt: Tensor, A: Tensor, weights: Tensor, values: Tensor, z: Tensor | None, chunks: Chunks, tile: Tile,
    *, CHUNK: int, BACKWARD: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What chunks add to the states, or to their gradients, and the products of their decays, `[chunks, N, D]`."""
    added, products = (dt.new_empty(chunks.count, *A.mT.shape, dtype=torch.float32) for _ in range(2))
    summary_kernel[grid(A, tile, chunks.count)](
        dt, A, weights, values, z, added, products, *places(dt, A, chunks),
        BACKWARD=BACKWARD, CHUNK=CHUNK, **options(A, tile),
    )  # fmt: skip
    return added, products


def carry(states: Tensor, products: Tensor, border: Tensor | None, chunks: Chunks, *, REVERSE: bool) -> None:
    """From what the chunks add to the states after all of them, in place, starting from `border`."""
    size = states[0].numel()
    carry_kernel[(chunks.sequences * triton.cdiv(size, linear.BLOCK),)](
        states, products, border, size, chunks.per_sequence, chunks.first_chunk,
        COMPLEX=False, REVERSE=REVERSE, TILE=linear.TILE, BLOCK=linear.BLOCK, num_warps=1,
    )  # fmt: skip


@triton.jit
def load_tokens(pointer, token, D, channel, mask):
    """`[TILE, BLOCK]` of x, dt, z or dy, 0 outside the mask; or of B or C, with D the number of states."""
    return tl.load(pointer + token * D + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def state_offsets(D, N, channel, STATES: tl.constexpr):
    """Where the states of some channels `[1, BLOCK]` lie among the `[N, D]` of a sequence or chunk, and which exist."""
    number = tl.arange(0, STATES)[:, None]
    return number * D + channel, (number < N) & (channel < D)


@triton.jit
def load_A(A, D, N, channel, STATES: tl.constexpr):
    """`[STATES, BLOCK]`, from `[D, N]`."""
    number = tl.arange(0, STATES)[:, None]
    inside = (number < N) & (channel < D)
    return tl.load(A + tl.cast(channel, tl.int64) * N + number, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_border(carried, border, neighbour, n, at_border, offsets, inside, M):
    """The state at a side of a chunk: from its neighbour there, or at the border of a sequence the sequence's own."""
    state = tl.zeros(offsets.shape, tl.float32)
    if border is not None:
        state = tl.load(border + n * M + offsets, mask=inside, other=0.0)
    if carried is not None:
        # A chunk at the border reads itself in place of a neighbour that may not be there.
        passed = tl.load(carried + tl.cast(neighbour, tl.int64) * M + offsets, mask=inside, other=0.0)
        state = tl.where(at_border, state, passed)
    return state


@kernel
def summary_kernel(
    dt, A, weights, values, z, added, products, T, D, N, cu_seqlens, sequence_of, first_chunk,
    BACKWARD: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state after it, with B and x, and the product of its decays:

        sum_t exp(A sum_{s > t} dt_s) B_t dt_t x_t        exp(A sum_t dt_t)

    BACKWARD, what it adds to the gradient of the state before it, with C and dy:

        sum_t exp(A sum_{s <= t} dt_s) C_t dy_t silu(z_t)
    """
    blocks = tl.cdiv(D, BLOCK)
    chunk = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    number = tl.arange(0, STATES)[None, :]
    _n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    rates = load_A(A, D, N, channel, STATES) * LOG2_E
    state = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    row = tl.arange(0, TILE)[:, None]
    for step in range(0, CHUNK, TILE):
        begin = place * CHUNK + (CHUNK - TILE - step if BACKWARD else step)
        i = begin + row
        mask = (i < length) & (channel < D)
        steps = load_tokens(dt, first + i, D, channel, mask)
        value = load_tokens(values, first + i, D, channel, mask)
        weight = load_tokens(weights, first + i, N, number, (i < length) & (number < N))
        if BACKWARD:
            elapsed = tl.cumsum(steps, axis=0)
            if z is not None:
                gate = load_tokens(z, first + i, D, channel, mask)
                value *= gate * tl.sigmoid(gate)
        else:
            later = mask & (i + 1 < length) & (row + 1 < TILE)
            elapsed = tl.cumsum(load_tokens(dt, first + i + 1, D, channel, later), axis=0, reverse=True)
            value *= steps
        tile_steps = tl.sum(steps, axis=0, keep_dims=True)
        decayed = tl.exp2(elapsed[:, None, :] * rates[None, :, :]) * value[:, None, :]
        state = tl.exp2(tile_steps * rates) * state + tl.sum(decayed * weight[:, :, None], axis=0)
        total += tile_steps
    offsets, inside = state_offsets(D, N, channel, STATES)
    at = tl.cast(chunk, tl.int64) * N * D + offsets
    tl.store(added + at, state, mask=inside)
    tl.store(products + at, tl.exp2(total * rates), mask=inside)


@kernel
def scan_kernel(
    x, dt, A, B, C, skip, z, carried, initial_state, y, final_state, T, D, N, cu_seqlens, sequence_of, first_chunk,
    CHUNK: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (h_t C_t + D x_t) silu(z_t)

    over a chunk, from the state before it. `skip` is the argument D.
    """
    blocks = tl.cdiv(D, BLOCK)
    chunk = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    number = tl.arange(0, STATES)[None, :]
    n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    rates = load_A(A, D, N, channel, STATES) * LOG2_E
    offsets, inside = state_offsets(D, N, channel, STATES)
    before = chunk - tl.where(place == 0, 0, 1)
    state = load_border(carried, initial_state, before, n, place == 0, offsets, inside, N * D)
    row = tl.arange(0, TILE)[:, None]
    if skip is not None:
        through = tl.load(skip + channel, mask=channel < D, other=0.0).to(tl.float32)
    for step in range(0, CHUNK, TILE):
        i = place * CHUNK + step + row
        mask = (i < length) & (channel < D)
        weighted = (i < length) & (number < N)
        steps = load_tokens(dt, first + i, D, channel, mask)
        value = load_tokens(x, first + i, D, channel, mask)
        decay = tl.exp2(steps[:, None, :] * rates[None, :, :])
        h = (steps * value)[:, None, :] * load_tokens(B, first + i, N, number, weighted)[:, :, None]
        h += tl.where(row[:, :, None] == 0, decay * state[None, :, :], 0.0)
        decay, h = tl.associative_scan((decay, h), 0, compose)
        out = tl.sum(h * load_tokens(C, first + i, N, number, weighted)[:, :, None], axis=1)
        if skip is not None:
            out += through * value
        if z is not None:
            gate = load_tokens(z, first + i, D, channel, mask)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + (first + i) * D + channel, out, mask=mask)
        state = tl.sum(tl.where(row[:, :, None] == TILE - 1, h, 0.0), axis=0)
    last = (place * CHUNK < length) & (length <= place * CHUNK + CHUNK)
    inside = (tl.arange(0, STATES)[:, None] < tl.where(last, N, 0)) & (channel < D)
    tl.store(final_state + n * N * D + offsets, state, mask=inside)
