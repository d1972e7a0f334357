"""Causal softmax attention with grouped heads: over all tokens, or within a sliding window in time linear in T.

Layout `[B, heads, T, K]`; H query heads share HKV heads of keys and values. The keys end with those of the T queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of T queries to L >= T keys: causal, or as the boolean `mask` (`[B or 1, 1, T, L]`) says.

    Args:
        q: `[B, H, T, K]`, the last T of the L tokens.
        k, v: `[B, HKV, L, K]`, H a multiple of HKV.
        scale: factor of q . k; K^{-1/2} if not given.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    batch, heads, length, size = q.shape
    kv_heads, seen = k.shape[1:3]
    if length == 1:  # the queries of a group stand in for time: keys and values are read once, not once per head
        o = F.scaled_dot_product_attention(q.view(batch, kv_heads, heads // kv_heads, size), k, v, mask, scale=scale)
        return o.view(q.shape)
    if mask is None and seen > length:
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=heads > kv_heads
    )


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query to the last `window` tokens, itself included.

    Computed in blocks of `window` queries, each against its own block of keys and the one before: T * window work.

    Args:
        q: `[B, H, T, K]`. k, v: `[B, HKV, T, K]`.
        past: keys and values `[B, HKV, window, K]` of the tokens before, oldest first, and how many of them there are,
            `[B]`; where fewer than `window`, the first slots are void.
        scale: factor of q . k; K^{-1/2} if not given.
    """
    length = q.shape[2]
    if past is None and length <= window:
        return attend(q, k, v, scale=scale)
    block = min(window, length)
    blocks = -(-length // block)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * block - length)) for x in (q, k, v))
    if past is None:
        count = torch.zeros(1, dtype=torch.int64, device=q.device)
        k, v = (F.pad(x, (0, 0, window, 0)) for x in (k, v))
    else:
        past_k, past_v, count = past
        k, v = torch.cat([past_k.to(k.dtype), k], dim=2), torch.cat([past_v.to(v.dtype), v], dim=2)

    def slabs(x: Tensor) -> Tensor:  # [B, HKV, window + T, K] -> [B * blocks, HKV, window + block, K]
        if blocks > 1:
            x = x.unflatten(2, (blocks + 1, window))
            x = torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3)
        return x.view(*x.shape[:2], blocks, window + block, x.shape[-1]).transpose(1, 2).flatten(0, 1)

    # In block i, slot j of the slab holds token i * block - window + j, and row r of the block is token i * block + r.
    row = torch.arange(block, device=q.device)[:, None]
    slot = torch.arange(window + block, device=q.device)
    near = (slot > row) & (slot <= row + window)  # [block, slab]
    token = slot + block * torch.arange(blocks, device=q.device)[:, None] - window
    exists = token >= -count[:, None, None]  # [B or 1, blocks, slab]
    mask = (near & exists[:, :, None]).expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
    o = attend(q.unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1), slabs(k), slabs(v), mask, scale)
    return o.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
