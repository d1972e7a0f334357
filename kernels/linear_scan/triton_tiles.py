"""What the kernels of the scans have in common: where a chunk lies, numbers with two parts, the scan of a tile.

A complex number is two float32 parts; of a real one both names are the same value, so that one kernel serves both.
"""

import triton
import triton.language as tl

from lm_zoo.kernels.triton_kernel import kernel


@triton.jit
def locate_chunk(chunk, T, cu_seqlens, sequence_of, first_chunk, CHUNK: tl.constexpr):
    """The sequence of a chunk, its first token and its length, and the place of the chunk in it."""
    if cu_seqlens is None:
        per_sequence = tl.cdiv(T, CHUNK)
        n = tl.cast(chunk // per_sequence, tl.int64)
        first, length, place = n * T, tl.cast(T, tl.int64), chunk % per_sequence
    else:
        n = tl.load(sequence_of + chunk)
        first = tl.cast(tl.load(cu_seqlens + n), tl.int64)
        length = tl.load(cu_seqlens + n + 1) - first
        place = chunk - tl.load(first_chunk + n)
    return n, first, length, place


@triton.jit
def load_parts(pointer, offsets, mask, COMPLEX: tl.constexpr):
    """Real and imaginary part in float32, 0 outside the mask; `offsets` and `mask` are tiles of two dimensions."""
    if COMPLEX:
        both = 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        re, im = tl.split(tl.load(pointer + both, mask=mask[:, :, None], other=0.0).to(tl.float32))
    else:
        re = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        im = re
    return re, im


@triton.jit
def store_parts(pointer, offsets, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        both = 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(pointer + both, tl.join(re, im), mask=mask[:, :, None])
    else:
        tl.store(pointer + offsets, re, mask=mask)


@triton.jit
def product(ar, ai, br, bi, COMPLEX: tl.constexpr):
    re, im = ar * br, ar * br
    if COMPLEX:
        re, im = re - ai * bi, ar * bi + ai * br
    return re, im


@triton.jit
def compose(a1, x1, a2, x2):
    """h -> a1 h + x1, then h -> a2 h + x2."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def compose_complex(ar1, ai1, xr1, xi1, ar2, ai2, xr2, xi2):
    return (
        ar1 * ar2 - ai1 * ai2,
        ar1 * ai2 + ai1 * ar2,
        ar2 * xr1 - ai2 * xi1 + xr2,
        ar2 * xi1 + ai2 * xr1 + xi2,
    )


@triton.jit
def scan_tile(ar, ai, xr, xi, hr, hi, COMPLEX: tl.constexpr):
    """h_t = a_t h_{t-1} + x_t along the first axis, from h `[1, BLOCK]`: the products of a up to each t, and h_t."""
    first = (tl.arange(0, xr.shape[0]) == 0)[:, None]
    fr, fi = product(ar, ai, hr, hi, COMPLEX)
    xr += tl.where(first, fr, 0.0)
    if COMPLEX:
        xi += tl.where(first, fi, 0.0)
        ar, ai, xr, xi = tl.associative_scan((ar, ai, xr, xi), 0, compose_complex)
    else:
        ar, xr = tl.associative_scan((ar, xr), 0, compose)
        ai, xi = ar, xr
    return ar, ai, xr, xi


@triton.jit
def last_row(values):
    """`[1, BLOCK]`. A sum with zeros, so exact."""
    last = (tl.arange(0, values.shape[0]) == values.shape[0] - 1)[:, None]
    return tl.sum(tl.where(last, values, 0.0), axis=0, keep_dims=True)


@kernel
def carry_kernel(
    states, products, initial_state, M, per_sequence, first_chunk,
    COMPLEX: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S_c = P_c S_{c-1} + added_c over the chunks c of a sequence, in place; with REVERSE, from S_{c+1}.

    `states` and `products` are `[chunks, M]`. A program takes some of the M numbers of the state of one sequence.
    """
    blocks = tl.cdiv(M, BLOCK)
    n = tl.cast(tl.program_id(0) // blocks, tl.int64)
    number = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = number < M
    first, length = n * per_sequence, tl.cast(per_sequence, tl.int64)
    if first_chunk is not None:
        first = tl.load(first_chunk + n)
        length = tl.load(first_chunk + n + 1) - first
    hr = tl.zeros((1, BLOCK), tl.float32)
    hi = hr
    if initial_state is not None:
        hr, hi = load_parts(initial_state, n * M + number, inside, COMPLEX)
    for begin in range(0, length, TILE):
        i = (begin + tl.arange(0, TILE))[:, None]
        chunk = first + i
        if REVERSE:
            chunk = first + length - 1 - i
        mask = (i < length) & inside
        at = chunk * M + number
        ar, ai = load_parts(products, at, mask, COMPLEX)
        xr, xi = load_parts(states, at, mask, COMPLEX)
        ar, ai, xr, xi = scan_tile(ar, ai, xr, xi, hr, hi, COMPLEX)
        store_parts(states, at, xr, xi, mask, COMPLEX)
        hr, hi = last_row(xr), last_row(xi)  # past the end only in the last tile
