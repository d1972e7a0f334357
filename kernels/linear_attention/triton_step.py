"""`linear_attention_step` in one launch: the state is read once, updated by all tokens in a row, and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.triton_kernel import kernel

STATE_TILE = 4096  # float32 numbers of the state per program: 32 registers a thread, and enough programs for one text
NUM_WARPS = 4


@kernel
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    state_ptr,
    o_ptr,
    scale,
    T,
    H,
    HV,
    state_batch_stride,
    state_head_stride,
    state_key_stride,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
):
    """S <- (I - beta k k^T) Diag(exp g) S + beta k v^T,  o = scale S^T q,  for T tokens one after the other.

    A program owns BLOCK_V columns of the state of one head: the columns do not depend on each other. It keeps them in
    registers, all K rows, whatever T is. DECAY: 0 none, 1 constant `[HV]`, 2 per token `[B, T, HV]`, 3 per token and
    key channel `[B, T, HV, K]`.
    """
    row = tl.program_id(0)  # of [B * HV]
    batch = tl.cast(row // HV, tl.int64)
    head = row % HV
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = rows < K
    column_mask = columns < V

    tile = state_ptr + batch * state_batch_stride + tl.cast(head, tl.int64) * state_head_stride
    tile += rows[:, None] * state_key_stride + columns[None, :]
    tile_mask = row_mask[:, None] & column_mask[None, :]
    S = tl.load(tile, mask=tile_mask, other=0.0)

    if DECAY == 1:
        constant = tl.exp(tl.load(g_ptr + head).to(tl.float32))
    for t in range(T):
        token = batch * T + t
        key_offset = (token * H + head // (HV // H)) * K
        value_head = token * HV + head
        q = tl.load(q_ptr + key_offset + rows, mask=row_mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + key_offset + rows, mask=row_mask, other=0.0).to(tl.float32)
        write = tl.load(v_ptr + value_head * V + columns, mask=column_mask, other=0.0).to(tl.float32)
        if DECAY == 1:
            S *= constant
        elif DECAY == 2:
            S *= tl.exp(tl.load(g_ptr + value_head).to(tl.float32))
        elif DECAY == 3:
            g = tl.load(g_ptr + value_head * K + rows, mask=row_mask, other=0.0).to(tl.float32)
            S *= tl.exp(g)[:, None]
        if beta_ptr is not None:
            write = (write - tl.sum(k[:, None] * S, axis=0)) * tl.load(beta_ptr + value_head).to(tl.float32)
        S += k[:, None] * write[None, :]
        o = tl.sum(q[:, None] * S, axis=0) * scale
        tl.store(o_ptr + value_head * V + columns, o.to(o_ptr.dtype.element_ty), mask=column_mask)
    tl.store(tile, S, mask=tile_mask)


def linear_attention_steps_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """The arguments of `linear_attention_step`, checked, with a time dimension or without."""
    q, k, v, log_decay, beta = (x if x is None else x.contiguous() for x in (q, k, v, log_decay, beta))
    tokens = q.shape[1] if q.dim() == 4 else 1
    batch, value_heads, key_size, value_size = state.shape
    S = state if state.stride(3) == 1 else state.contiguous()
    o = torch.empty_like(v)
    decay = 0
    if log_decay is not None:
        decay = {1: 1, v.dim() - 1: 2, v.dim(): 3}[log_decay.dim()]
    block_k = triton.next_power_of_2(key_size)
    block_v = min(triton.next_power_of_2(value_size), STATE_TILE // block_k)
    grid = (batch * value_heads, triton.cdiv(value_size, block_v))
    if o.numel():
        step_kernel[grid](
            q,
            k,
            v,
            log_decay,
            beta,
            S,
            o,
            scale,
            tokens,
            q.shape[-2],
            value_heads,
            *S.stride()[:3],
            K=key_size,
            V=value_size,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            DECAY=decay,
            num_warps=NUM_WARPS,
        )
    if S is not state:
        state.copy_(S)
    return o
