"""The Triton kernels of the convolution: forward, backward and one token, with the activation, in `[B, T, D]`.

    y_t = act(z_t)        z_t = sum_w weight_w x_{t - W + 1 + w} + bias

A tile is BLOCK_T tokens of BLOCK_D channels. What a token sees of the past is a load of the same tile some rows up,
which the caches serve; the backward pass computes z again.
"""

import triton
import triton.language as tl

from lm_zoo.kernels.triton_kernel import kernel


@triton.jit
def sequence_of(sequences_ptr, cu_seqlens_ptr, token, T):
    """Of packed tokens: the row of the state that is theirs, and where their sequence begins. 0 for others."""
    row = tl.zeros_like(token)
    begin = tl.zeros_like(token)
    if sequences_ptr is not None:
        row = tl.load(sequences_ptr + token, mask=token < T, other=0).to(tl.int32)
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int32)
    return row, begin


@triton.jit
def load_input(x_ptr, past_ptr, row, begin, token, offset, SHIFT, T, D, channel, x_stride, W: tl.constexpr):
    """x_{token + SHIFT} as a token of the sequence that starts at `begin` sees it: what was before is in the state.

    `x_ptr` and `offset` are those of the tile: only differences within it have to fit into 32 bits.
    """
    source = token[:, None] + SHIFT
    inside = (source >= begin[:, None]) & (source < T) & (channel < D)[None, :]
    x = tl.load(x_ptr + (offset[:, None] + SHIFT) * x_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if past_ptr is not None:
        slot = source - begin[:, None] + W - 1  # at or after 0, if it is of the past of a token
        before = (source < begin[:, None]) & (slot >= 0) & (channel < D)[None, :]
        past = past_ptr + row.to(tl.int64)[:, None] * (D * (W - 1)) + (channel * (W - 1))[None, :] + slot
        x += tl.load(past, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def before_activation(
    x_ptr, past_ptr, weight_ptr, bias_ptr, row, begin, token, offset, SHIFT, T, D, channel, x_stride, W: tl.constexpr
):
    """z of the tokens `token + SHIFT`, whose sequences `row` and `begin` describe."""
    z = tl.zeros([token.shape[0], channel.shape[0]], tl.float32)
    for w in tl.static_range(W):
        weight = tl.load(weight_ptr + channel * W + w, mask=channel < D, other=0.0).to(tl.float32)
        shift = SHIFT + w - (W - 1)
        x = load_input(x_ptr, past_ptr, row, begin, token, offset, shift, T, D, channel, x_stride, W)
        z += weight[None, :] * x
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def times_slope(dy, z, SILU: tl.constexpr):
    """dz from dy."""
    if SILU:
        s = tl.sigmoid(z)
        dy *= s * (1 + z * (1 - s))
    return dy


@kernel
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    past_ptr,
    sequences_ptr,
    cu_seqlens_ptr,
    y_ptr,
    T,
    D,
    x_batch_stride,
    x_stride,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y_t = act(sum_w weight_w x_{t - W + 1 + w} + bias)"""
    batch = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_T
    offset = tl.arange(0, BLOCK_T)
    token = first + offset
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(batch, tl.int64) * x_batch_stride + tl.cast(first, tl.int64) * x_stride
    if past_ptr is not None:
        past_ptr += tl.cast(batch, tl.int64) * D * (W - 1)
    row, begin = sequence_of(sequences_ptr, cu_seqlens_ptr, token, T)
    y = before_activation(
        x_ptr, past_ptr, weight_ptr, bias_ptr, row, begin, token, offset, 0, T, D, channel, x_stride, W
    )
    if SILU:
        y *= tl.sigmoid(y)
    y_ptr += (tl.cast(batch, tl.int64) * T + first) * D
    mask = (token < T)[:, None] & (channel < D)[None, :]
    tl.store(y_ptr + offset[:, None] * D + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    past_ptr,
    sequences_ptr,
    cu_seqlens_ptr,
    dx_ptr,
    dweight_ptr,
    T,
    D,
    x_batch_stride,
    x_stride,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
    TAPS: tl.constexpr,
):
    """dz = dy act'(z)     dx_t = sum_w weight_w dz_{t + W - 1 - w}     dweight_w = sum_t dz_t x_{t - W + 1 + w}

    Over RUN tokens; what they add to dweight, and to dbias as its row W, goes to `dweight_ptr` `[B, runs, W + 1, D]`.
    """
    batch = tl.program_id(2)
    run = tl.program_id(0)
    offset = tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight_ptr += (tl.cast(batch, tl.int64) * tl.num_programs(0) + run) * (W + 1) * D
    x_ptr += tl.cast(batch, tl.int64) * x_batch_stride
    if past_ptr is not None:
        past_ptr += tl.cast(batch, tl.int64) * D * (W - 1)
    dy_ptr += tl.cast(batch, tl.int64) * T * D
    dx_ptr += tl.cast(batch, tl.int64) * T * D
    tap = tl.arange(0, TAPS)
    dweight = tl.zeros([TAPS, BLOCK_D], tl.float32)
    # Up to RUN, not to T: with a bound that is no constant, ptxas for Hopper keeps a register of the loop in memory.
    for tile in range(RUN // BLOCK_T):
        first = run * RUN + tile * BLOCK_T
        token = first + offset
        row, begin = sequence_of(sequences_ptr, cu_seqlens_ptr, token, T)
        x_tile = x_ptr + tl.cast(first, tl.int64) * x_stride
        origin = tl.cast(first, tl.int64) * D
        dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for shift in tl.range(W, loop_unroll_factor=1):  # unrolled, it would not fit into the registers
            later = token + shift
            later_row, later_begin = sequence_of(sequences_ptr, cu_seqlens_ptr, later, T)
            z = before_activation(
                x_tile,
                past_ptr,
                weight_ptr,
                bias_ptr,
                later_row,
                later_begin,
                token,
                offset,
                shift,
                T,
                D,
                channel,
                x_stride,
                W,
            )
            inside = ((later < T) & (later_begin == begin))[:, None] & (channel < D)[None, :]
            dy = tl.load(dy_ptr + origin + (offset[:, None] + shift) * D + channel[None, :], mask=inside, other=0.0)
            dz = times_slope(dy.to(tl.float32), z, SILU)
            weight = tl.load(weight_ptr + channel * W + (W - 1 - shift), mask=channel < D, other=0.0).to(tl.float32)
            dx += weight[None, :] * dz
            if shift == 0:
                dweight += tl.where((tap == W)[:, None], tl.sum(dz, axis=0)[None, :], 0.0)
                for w in tl.static_range(W):
                    x = load_input(x_tile, past_ptr, row, begin, token, offset, w - (W - 1), T, D, channel, x_stride, W)
                    dweight += tl.where((tap == w)[:, None], tl.sum(dz * x, axis=0)[None, :], 0.0)
        mask = (token < T)[:, None] & (channel < D)[None, :]
        tl.store(dx_ptr + origin + offset[:, None] * D + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    mask = (tap <= W)[:, None] & (channel < D)[None, :]
    tl.store(dweight_ptr + tap[:, None] * D + channel[None, :], dweight, mask=mask)


@kernel
def state_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    past_ptr,
    cu_seqlens_ptr,
    dpast_ptr,
    T,
    D,
    x_batch_stride,
    x_stride,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dpast_j = sum_{t <= j} weight_{j - t} dz_t  over the first W - 1 tokens of a sequence; past `[N, D, W - 1]`"""
    sequence = tl.program_id(0)
    offset = tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    past_ptr += tl.cast(sequence, tl.int64) * D * (W - 1)
    row = tl.zeros_like(offset)
    begin = tl.zeros_like(offset)
    end = T
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence)
        begin += first.to(tl.int32)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32)
        x_ptr += tl.cast(first, tl.int64) * x_stride
        dy_ptr += tl.cast(first, tl.int64) * D
    else:
        x_ptr += tl.cast(sequence, tl.int64) * x_batch_stride
        dy_ptr += tl.cast(sequence, tl.int64) * T * D
    token = begin + offset
    z = before_activation(
        x_ptr, past_ptr, weight_ptr, bias_ptr, row, begin, token, offset, 0, T, D, channel, x_stride, W
    )
    inside = (token < end)[:, None] & (channel < D)[None, :]
    dy = tl.load(dy_ptr + offset[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    dz = times_slope(dy, z, SILU)
    dpast_ptr += (tl.cast(sequence, tl.int64) * D + channel) * (W - 1)
    for slot in tl.static_range(W - 1):
        used = (slot - offset >= 0)[:, None] & (channel < D)[None, :]
        weight = tl.load(weight_ptr + channel[None, :] * W + (slot - offset)[:, None], mask=used, other=0.0)
        dpast = tl.sum(weight.to(tl.float32) * dz, axis=0)
        tl.store(dpast_ptr + slot, dpast.to(dpast_ptr.dtype.element_ty), mask=channel < D)


@kernel
def step_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    y_ptr,
    D,
    x_batch_stride,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """y = act(sum_{w < W - 1} weight_w state_w + weight_{W - 1} x + bias)    state <- [state_1, ..., x]"""
    batch = tl.cast(tl.program_id(0), tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.arange(0, SLOTS)
    mask = channel < D
    x = tl.load(x_ptr + batch * x_batch_stride + channel, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.load(weight_ptr + channel * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    if W > 1:
        tile = state_ptr + (batch * D + channel)[:, None] * (W - 1) + slot[None, :]
        held = mask[:, None] & (slot < W - 1)[None, :]
        weight = tl.load(weight_ptr + channel[:, None] * W + slot[None, :], mask=held, other=0.0).to(tl.float32)
        y += tl.sum(weight * tl.load(tile, mask=held, other=0.0).to(tl.float32), axis=1)
        after = tl.load(tile + 1, mask=held & (slot < W - 2)[None, :], other=0.0)
        after = tl.where((slot == W - 2)[None, :], x[:, None].to(after.dtype), after)
        tl.debug_barrier()  # every thread has read the state before one of them writes
        tl.store(tile, after, mask=held)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + batch * D + channel, y.to(y_ptr.dtype.element_ty), mask=mask)
