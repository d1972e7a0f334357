"""The scan in Triton, the twin of `two_level.py`: chunks of tokens side by side.

    1 summarize   what each chunk adds to the state, and the product of its decays      (`summary_kernel`)
    2 carry       the states over the chunks of each sequence, a tile of them at a time (`carry_kernel`)
    3 scan        each chunk from the state before it                                   (`scan_kernel`)

Where no sequence is longer than a chunk there is the third alone. A chunk is scanned in tiles `[TILE, BLOCK]` by
`tl.associative_scan` over pairs (a, x), so nothing is divided by a product of decays. Beside h this takes 2 / CHUNK
float32 numbers per token and channel. All kernels count tokens in the order of their scan, whichever way it runs.

The backward pass is the same scan, run the other way (`two_level.linear_scan_backward` has the equations).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_scan.chunks import Chunks, cut
from lm_zoo.kernels.linear_scan.triton_tiles import (
    carry_kernel,
    last_row,
    load_parts,
    locate_chunk,
    product,
    scan_tile,
    store_parts,
)
from lm_zoo.kernels.triton_kernel import kernel

CHUNK = 128  # tokens
TILE = 8  # tokens of a chunk, or chunks of a sequence, that are scanned at a time
# Channels of a program. One warp has all of them, so that the tokens of a tile lie in the registers of a lane and the
# scan over float32 needs no exchange. Compiled, that takes up to 190 registers, with 8 x 32 complex numbers up to 168;
# 8 x 64 of those would take all there are.
BLOCK = 128
COMPLEX_BLOCK = 32


def linear_scan_forward(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    chunks = cut(x.shape[0], x.shape[1], cu_seqlens, CHUNK)
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = _states_like(x, chunks, initial_state)
    x, decay, initial_state = map(_parts, (x, decay, initial_state))
    options = {"REVERSE": reverse, **_tile(h)}
    carried = _carry(x, decay, initial_state, chunks, BACKWARD=False, **options)
    scan_kernel[_grid(h, chunks.count)](
        x, decay, carried, initial_state, _parts(h), _parts(final_state), *_places(x, chunks), CHUNK=CHUNK, **options
    )
    return h, final_state


def linear_scan_backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = cut(h.shape[0], h.shape[1], cu_seqlens, CHUNK)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    ddecay = torch.empty_like(decay, memory_format=torch.contiguous_format)
    dinitial_state = None if initial_state is None else _states_like(h, chunks, dfinal_state)
    g_final = None if dfinal_state is None else _parts(dfinal_state.conj())
    dh, decay, h = map(_parts, (dh, decay, h))
    options = {"REVERSE": not reverse, **_tile(dx)}
    carried = _carry(dh, decay, g_final, chunks, BACKWARD=True, **options)
    scan_backward_kernel[_grid(dx, chunks.count)](
        dh, decay, h, carried, g_final, _parts(initial_state), _parts(dx), _parts(ddecay), _parts(dinitial_state),
        *_places(dh, chunks), CHUNK=CHUNK, **options,
    )  # fmt: skip
    dinitial_state = dx.new_empty(0) if initial_state is None else dinitial_state.to(initial_state.dtype)
    return dx, ddecay, dinitial_state


def linear_scan_step(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    in_place = torch.view_as_real(state) if state.is_complex() else state
    tile = _tile(x)
    step_kernel[_grid(x, x.shape[0])](
        _parts(x), _parts(decay), in_place, _parts(h), x.shape[1], *state.stride(),
        COMPLEX=tile["COMPLEX"], BLOCK=tile["BLOCK"], num_warps=1,
    )  # fmt: skip
    return h


def _parts(x: Tensor | None) -> Tensor | None:
    """Contiguous, complex numbers as pairs: a view wherever x is such a tensor already."""
    if x is None:
        return None
    x = x.resolve_conj().resolve_neg().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def _states_like(x: Tensor, chunks: Chunks, states: Tensor | None) -> Tensor:
    """A copy of the states in the precision of the kernels, or zeros: what a sequence without tokens ends with."""
    dtype = torch.complex64 if x.is_complex() else torch.float32
    if states is None:
        return x.new_zeros(chunks.sequences, x.shape[-1], dtype=dtype)
    return states.resolve_conj().resolve_neg().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _tile(x: Tensor) -> dict:
    block = COMPLEX_BLOCK if x.is_complex() else BLOCK
    return {"COMPLEX": x.is_complex(), "TILE": TILE, "BLOCK": block, "num_warps": 1}


def _grid(x: Tensor, rows: int) -> tuple[int]:
    return (rows * triton.cdiv(x.shape[-1], _tile(x)["BLOCK"]),)


def _places(x: Tensor, chunks: Chunks) -> tuple:
    return x.shape[1], x.shape[2], chunks.cu_seqlens, chunks.sequence_of, chunks.first_chunk


def _carry(x, decay, initial_state, chunks: Chunks, *, BACKWARD, REVERSE, **tile) -> Tensor | None:
    """The states after all chunks, or `None` where no sequence has a second one."""
    if chunks.per_sequence == 1:
        return None
    states, products = (x.new_empty(chunks.count, *x.shape[2:], dtype=torch.float32) for _ in range(2))
    blocks = triton.cdiv(x.shape[2], tile["BLOCK"])
    summary_kernel[(chunks.count * blocks,)](
        x, decay, states, products, *_places(x, chunks), BACKWARD=BACKWARD, REVERSE=REVERSE, CHUNK=CHUNK, **tile
    )
    carry_kernel[(chunks.sequences * blocks,)](
        states, products, initial_state, x.shape[2], chunks.per_sequence, chunks.first_chunk, REVERSE=False, **tile
    )
    return states


@triton.jit
def channel_block(D, BLOCK: tl.constexpr):
    """The chunk and the channels of a program; neighbours take neighbouring channels of the same tokens."""
    blocks = tl.cdiv(D, BLOCK)
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    return tl.program_id(0) // blocks, channel, channel < D


@triton.jit
def load_tile(
    x, decay, first, length, i, D, channel, inside,
    BACKWARD: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Decays and inputs of the tokens i `[TILE, 1]` of a sequence, and where they are; the identity past its end.

    BACKWARD takes conj(x), and with each token the decay of the one before it in this scan: between a token's gradient
    and its successor's stands the successor's decay. Before the first one there is none.
    """
    token = first + i
    if REVERSE:
        token = first + length - 1 - i
    mask = (i < length) & inside
    at = token * D + channel
    xr, xi = load_parts(x, at, mask, COMPLEX)
    if BACKWARD:
        xi = -xi
        decayed = mask & (i > 0)
        ar, ai = load_parts(decay, at + D if REVERSE else at - D, decayed, COMPLEX)
    else:
        decayed = mask
        ar, ai = load_parts(decay, at, decayed, COMPLEX)
    return tl.where(decayed, ar, 1.0), ai, xr, xi, at, mask


@triton.jit
def state_before(carried, initial_state, chunk, n, place, D, channel, COMPLEX: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk, `[1, BLOCK]`."""
    hr = tl.zeros((1, BLOCK), tl.float32)
    hi = hr
    if initial_state is not None:
        hr, hi = load_parts(initial_state, n * D + channel, channel < tl.where(place == 0, D, 0), COMPLEX)
    if carried is not None:
        before = tl.cast(chunk, tl.int64) - 1
        cr, ci = load_parts(carried, before * D + channel, channel < tl.where(place == 0, 0, D), COMPLEX)
        hr, hi = tl.where(place == 0, hr, cr), tl.where(place == 0, hi, ci)
    return hr, hi


@triton.jit
def in_last_chunk(length, place, D, channel, CHUNK: tl.constexpr):
    """Where the channels of a chunk are, if it is the last one of its sequence."""
    last = (place * CHUNK < length) & (length <= place * CHUNK + CHUNK)
    return channel < tl.where(last, D, 0)


@kernel
def summary_kernel(
    x, decay, added, products, T, D, cu_seqlens, sequence_of, first_chunk,
    BACKWARD: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk as the map h -> product h + added, `[chunks, D]`."""
    chunk, channel, inside = channel_block(D, BLOCK)
    _n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    hr = tl.zeros((1, BLOCK), tl.float32)
    pr = tl.full((1, BLOCK), 1.0, tl.float32)
    hi = hr
    pi = hr
    for begin in range(0, CHUNK, TILE):
        i = (place * CHUNK + begin + tl.arange(0, TILE))[:, None]
        ar, ai, xr, xi, _at, _mask = load_tile(
            x, decay, first, length, i, D, channel, inside, BACKWARD, REVERSE, COMPLEX
        )
        ar, ai, xr, xi = scan_tile(ar, ai, xr, xi, hr, hi, COMPLEX)
        hr, hi = last_row(xr), last_row(xi)
        pr, pi = product(pr, pi, last_row(ar), last_row(ai), COMPLEX)
    at = tl.cast(chunk, tl.int64) * D + channel
    store_parts(added, at, hr, hi, inside, COMPLEX)
    store_parts(products, at, pr, pi, inside, COMPLEX)


@kernel
def scan_kernel(
    x, decay, carried, initial_state, h, final_state, T, D, cu_seqlens, sequence_of, first_chunk,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t over a chunk, from the state before it."""
    chunk, channel, inside = channel_block(D, BLOCK)
    n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    hr, hi = state_before(carried, initial_state, chunk, n, place, D, channel, COMPLEX, BLOCK)
    for begin in range(0, CHUNK, TILE):
        i = (place * CHUNK + begin + tl.arange(0, TILE))[:, None]
        ar, ai, xr, xi, at, mask = load_tile(x, decay, first, length, i, D, channel, inside, False, REVERSE, COMPLEX)
        ar, ai, xr, xi = scan_tile(ar, ai, xr, xi, hr, hi, COMPLEX)
        store_parts(h, at, xr, xi, mask, COMPLEX)
        hr, hi = last_row(xr), last_row(xi)
    last = in_last_chunk(length, place, D, channel, CHUNK)
    store_parts(final_state, n * D + channel, hr, hi, last, COMPLEX)


@kernel
def scan_backward_kernel(
    dh, decay, h, carried, g_final, initial_state, dx, ddecay, dinitial_state,
    T, D, cu_seqlens, sequence_of, first_chunk,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g_t = conj(dh_t) + a_{t+1} g_{t+1}        dx_t = conj(g_t)        da_t = conj(g_t h_{t-1})

    Tokens are counted from the last one that the op has scanned; REVERSE is the direction of this scan.
    """
    chunk, channel, inside = channel_block(D, BLOCK)
    n, first, length, place = locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK)
    gr, gi = state_before(carried, g_final, chunk, n, place, D, channel, COMPLEX, BLOCK)
    sr = tl.zeros((1, BLOCK), tl.float32)
    si = sr
    if initial_state is not None:
        sr, si = load_parts(initial_state, n * D + channel, inside, COMPLEX)
    for begin in range(0, CHUNK, TILE):
        i = (place * CHUNK + begin + tl.arange(0, TILE))[:, None]
        ar, ai, xr, xi, at, mask = load_tile(dh, decay, first, length, i, D, channel, inside, True, REVERSE, COMPLEX)
        ar, ai, xr, xi = scan_tile(ar, ai, xr, xi, gr, gi, COMPLEX)
        store_parts(dx, at, xr, -xi, mask, COMPLEX)
        hr, hi = load_parts(h, at - D if REVERSE else at + D, mask & (i < length - 1), COMPLEX)
        hr, hi = tl.where(i < length - 1, hr, sr), tl.where(i < length - 1, hi, si)
        hr, hi = product(xr, xi, hr, hi, COMPLEX)
        store_parts(ddecay, at, hr, -hi, mask, COMPLEX)
        gr, gi = last_row(xr), last_row(xi)
    if dinitial_state is not None:
        last = in_last_chunk(length, place, D, channel, CHUNK)
        token = first if REVERSE else first + length - 1
        ar, ai = load_parts(decay, token * D + channel, last, COMPLEX)
        gr, gi = product(ar, ai, gr, gi, COMPLEX)
        store_parts(dinitial_state, n * D + channel, gr, -gi, last, COMPLEX)


@kernel
def step_kernel(
    x, decay, state, h, D, stride_row, stride_channel,
    COMPLEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h <- a h + x, in place."""
    row, channel, inside = channel_block(D, BLOCK)
    row = tl.cast(row, tl.int64)
    at = row * D + channel
    xr, xi = load_parts(x, at, inside, COMPLEX)
    ar, ai = load_parts(decay, at, inside, COMPLEX)
    here = row * stride_row + channel * stride_channel
    hr, hi = load_parts(state, here, inside, COMPLEX)
    hr, hi = product(ar, ai, hr, hi, COMPLEX)
    hr += xr
    hi += xi
    store_parts(state, here, hr, hi, inside, COMPLEX)
    store_parts(h, at, hr, hi, inside, COMPLEX)
