"""The selective scan in Triton, the twin of `segmented.py`: chunks of tokens side by side.

    1 summarize   what each chunk adds to the state, and the product of its decays      (`summary_kernel`)
    2 carry       the states over the chunks of each sequence                           (`linear_scan`'s `carry_kernel`)
    3 scan        each chunk from the state before it                                   (`scan_kernel`)

Where no sequence is longer than a chunk there is the third alone. The states of a tile of tokens exist in registers
only, `[TILE, N, BLOCK]`: channels run along the lanes of one warp, and time lies within a lane, so that a scan over it
exchanges nothing. With N = 16 a lane also has half of the states of a channel, or a quarter, and no warp waits for
another. All exponents are <= 0.

On an H100, the unit for exponentials takes as long for one as eight other instructions take to issue. So 1 and 3 take
one each per token, channel and state, and little else.

The backward pass needs nothing but the inputs. It does 1 and 2 again, in both directions from the same exponentials,
and keeps the state before each tile as it would be if nothing came before the chunk; then one kernel does the rest
(`triton_backward.py`), once more with one exponential. Within a call it holds N / 8 float32 numbers per token and
channel for the tiles, 3 N / 128 for the chunks, and 2 N / GROUP for dB and dC, which are sums over groups of channels.
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


CHUNK = 128  # tokens
FORWARD = Tile(4, 256, 1)
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
        carried, products, *_ = summarize(dt, A, B, x, None, None, None, chunks, FORWARD)
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
    dt: Tensor, A: Tensor, B: Tensor, x: Tensor, C: Tensor | None, dy: Tensor | None, z: Tensor | None,
    chunks: Chunks, tile: Tile,
) -> list[Tensor | None]:  # fmt: skip
    """What chunks add to the states, and the products of their decays, `[chunks, N, D]`. With dy, also what they add to
    the gradients of the states, and for each tile the state before it `[tiles, N, D]`, if nothing came before the
    chunk, and the sum of dt since then `[tiles, D]`."""
    channels, size = A.shape
    tiles = x.shape[0] * x.shape[1] // tile.tokens + chunks.count
    shapes = [(chunks.count, size, channels)] * 2
    if dy is not None:
        shapes += [(chunks.count, size, channels), (tiles, size, channels), (tiles, channels)]
    found = [dt.new_empty(shape, dtype=torch.float32) for shape in shapes] + [None] * (5 - len(shapes))
    summary_kernel[grid(A, tile, chunks.count)](
        x, dt, A, B, C, z, dy, *found, *places(dt, A, chunks), CHUNK=CHUNK, **options(A, tile)
    )
    return found


def carry(states: Tensor, products: Tensor, border: Tensor | None, chunks: Chunks, *, REVERSE: bool) -> None:
    """From what the chunks add to the states after all of them, in place, starting from `border`."""
    size = states[0].numel()
    carry_kernel[(chunks.sequences * triton.cdiv(size, linear.BLOCK),)](
        states, products, border, size, chunks.per_sequence, chunks.first_chunk,
        COMPLEX=False, REVERSE=REVERSE, TILE=linear.TILE, BLOCK=linear.BLOCK, num_warps=1,
    )  # fmt: skip


@triton.jit
def locate(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK: tl.constexpr):
    """The sequence of a chunk, its first token, how many it has, its place in the sequence, and whether it is the last.

    Offsets of a chunk are 64-bit, offsets inside it 32-bit.
    """
    n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    start = tl.cast(place, tl.int64) * CHUNK
    count = tl.cast(tl.maximum(tl.minimum(length - start, CHUNK), 0), tl.int32)
    return n, first + start, count, place, length <= start + CHUNK


@triton.jit
def place_of_tile(chunk, first, begin, TILE: tl.constexpr):
    """Of the tile from token `begin` of a chunk on, among all: a chunk has at most one more than its share."""
    return first // TILE + chunk + begin // TILE


@triton.jit
def load_tokens(pointer, first, i, D, channel, mask):
    """`[TILE, BLOCK]` of x, dt, z or dy, for the tokens i after `first`, 0 outside the mask; or of B or C, with D the
    number of states."""
    return tl.load(pointer + first * D + (i * D + channel), mask=mask, other=0.0).to(tl.float32)


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


@triton.jit
def scan_tile(decay, x, product, state):
    """Products of decays up to each token of a tile, and its states, from those `[1, STATES, BLOCK]` before it."""
    first = (tl.arange(0, x.shape[0]) == 0)[:, None, None]
    x = tl.where(first, decay * state + x, x)
    decay = tl.where(first, decay * product, decay)
    return tl.associative_scan((decay, x), 0, compose)


@triton.jit
def last_of(x):
    """The last row, `[1, ...]`: a sum with zeros, so exact."""
    last = (tl.arange(0, x.shape[0]) == x.shape[0] - 1)[:, None, None]
    return tl.sum(tl.where(last, x, 0.0), axis=0, keep_dims=True)


@kernel
def summary_kernel(
    x, dt, A, B, C, z, dy, added, products, dadded, inner, elapsed, T, D, N, cu_seqlens, sequence_of, first_chunk,
    CHUNK: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk as the map h -> products h + added; with dy, also what it adds to the gradient of the state before it:

    products = exp(A sum_t dt_t)        dadded = sum_t exp(A sum_{s <= t} dt_s) C_t dy_t silu(z_t)
    """
    blocks = tl.cdiv(D, BLOCK)
    chunk = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    number = tl.arange(0, STATES)[None, :]
    _n, first, count, _place, _last = locate(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    rates = (load_A(A, D, N, channel, STATES) * LOG2_E)[None, :, :]
    offsets, inside = state_offsets(D, N, channel, STATES)
    state = tl.zeros((1, STATES, BLOCK), tl.float32)
    product = tl.full((1, STATES, BLOCK), 1.0, tl.float32)
    dstate = tl.zeros((1, STATES, BLOCK), tl.float32)
    time = tl.zeros((1, BLOCK), tl.float32)
    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)[:, None]
        mask = (i < count) & (channel < D)
        weighted = (i < count) & (number < N)
        steps = load_tokens(dt, first, i, D, channel, mask)
        if dy is not None:
            tile = place_of_tile(chunk, first, begin, TILE)
            tl.store(inner + tile * N * D + offsets, tl.sum(state, axis=0), mask=inside)
            tl.store(elapsed + tile * D + channel, time, mask=channel < D)
            time += tl.sum(steps, axis=0, keep_dims=True)
        decay = tl.exp2(steps[:, None, :] * rates)
        write = steps * load_tokens(x, first, i, D, channel, mask)
        write = write[:, None, :] * load_tokens(B, first, i, N, number, weighted)[:, :, None]
        decay, h = scan_tile(decay, write, product, state)
        product, state = last_of(decay), last_of(h)
        if dy is not None:
            dout = load_tokens(dy, first, i, D, channel, mask)
            if z is not None:
                gate = load_tokens(z, first, i, D, channel, mask)
                dout *= gate * tl.sigmoid(gate)
            read = load_tokens(C, first, i, N, number, weighted)[:, :, None]
            dstate += tl.sum(decay * (read * dout[:, None, :]), axis=0, keep_dims=True)
    at = tl.cast(chunk, tl.int64) * N * D + offsets
    tl.store(added + at, tl.sum(state, axis=0), mask=inside)
    tl.store(products + at, tl.sum(product, axis=0), mask=inside)
    if dy is not None:
        tl.store(dadded + at, tl.sum(dstate, axis=0), mask=inside)


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
    n, first, count, place, last = locate(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    rates = (load_A(A, D, N, channel, STATES) * LOG2_E)[None, :, :]
    offsets, inside = state_offsets(D, N, channel, STATES)
    before = chunk - tl.where(place == 0, 0, 1)
    state = load_border(carried, initial_state, before, n, place == 0, offsets, inside, N * D)[None, :, :]
    if skip is not None:
        through = tl.load(skip + channel, mask=channel < D, other=0.0).to(tl.float32)
    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)[:, None]
        mask = (i < count) & (channel < D)
        weighted = (i < count) & (number < N)
        steps = load_tokens(dt, first, i, D, channel, mask)
        value = load_tokens(x, first, i, D, channel, mask)
        decay = tl.exp2(steps[:, None, :] * rates)
        write = (steps * value)[:, None, :] * load_tokens(B, first, i, N, number, weighted)[:, :, None]
        _decay, h = scan_tile(decay, write, 1.0, state)
        state = last_of(h)
        out = tl.sum(h * load_tokens(C, first, i, N, number, weighted)[:, :, None], axis=1)
        if skip is not None:
            out += through * value
        if z is not None:
            gate = load_tokens(z, first, i, D, channel, mask)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + first * D + (i * D + channel), out, mask=mask)
    inside = (tl.arange(0, STATES)[:, None] < tl.where(last & (count > 0), N, 0)) & (channel < D)
    tl.store(final_state + n * N * D + offsets, tl.sum(state, axis=0), mask=inside)
