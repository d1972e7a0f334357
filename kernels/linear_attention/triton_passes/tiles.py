"""Tiles of tokens and channels, as the kernels load, store and multiply them."""

import triton
import triton.language as tl


def padded(size: int) -> int:
    """The tile that holds `size` channels: a power of two, and what a product of tiles takes at least."""
    return max(16, 1 << (size - 1).bit_length())


def blocks(size: int, block: int) -> int:
    """How many hold `size` channels or tokens. `triton.cdiv` takes ten times as long on the host."""
    return -(-size // block)


@triton.jit
def load_tokens(x, token, end, head, HEADS, channel, SIZE: tl.constexpr):
    """`[tokens, channels]` of x `[B T, HEADS, SIZE]`, 0 from the token `end` and the channel SIZE on."""
    at = (token * HEADS + head)[:, None] * SIZE + channel[None, :]
    return tl.load(x + at, mask=(token < end)[:, None] & (channel < SIZE)[None, :], other=0.0)


@triton.jit
def load_channels(x, token, end, head, HEADS, channel, SIZE: tl.constexpr):
    """`[channels, tokens]`, else as `load_tokens`."""
    at = (token * HEADS + head)[None, :] * SIZE + channel[:, None]
    return tl.load(x + at, mask=(token < end)[None, :] & (channel < SIZE)[:, None], other=0.0)


@triton.jit
def store_tokens(x, tile, token, end, head, HEADS, channel, SIZE: tl.constexpr):
    """Writes a tile `[tokens, channels]` to x `[B T, HEADS, SIZE]`, in the dtype of x."""
    at = (token * HEADS + head)[:, None] * SIZE + channel[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=(token < end)[:, None] & (channel < SIZE)[None, :])


@triton.jit
def load_gates(x, token, end, head, HEADS):
    """`[tokens]` of x `[B T, HEADS]` in float32, 0 from the token `end` on."""
    return tl.load(x + token * HEADS + head, mask=token < end, other=0.0).to(tl.float32)


@triton.jit
def dot(a, b, total=None):
    """a @ b + total, accumulated in float32; float32 tiles are not rounded to TF32."""
    return tl.dot(a, b, total, input_precision="ieee")
