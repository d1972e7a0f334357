"""Pass 4 backwards: chunk_states_backward, the only backward pass that is sequential over the chunks."""

import triton.language as tl
from torch import Tensor

from lm_zoo.kernels.linear_attention.triton_passes.launch import TABLE, Launch, launch
from lm_zoo.kernels.linear_attention.triton_passes.segment import C, Segment, sequence_chunks
from lm_zoo.kernels.linear_attention.triton_passes.states import sequence_tokens
from lm_zoo.kernels.linear_attention.triton_passes.tiles import (
    blocks,
    dot,
    load_channels,
    load_gates,
    load_tokens,
    padded,
    store_tokens,
)
from lm_zoo.kernels.triton_kernel import kernel

# Launch.block: columns of the state that a program carries, with all their K rows. A decay per channel brings a tile of
# gates as large as that of the keys, in float32.
TABLE["chunk_states_backward_kernel", "large"] = {64: Launch(32, 8, 2), 128: Launch(32, 8, 2), 256: Launch(32, 8, 2)}
TABLE["chunk_states_backward_kernel", "small"] = {64: Launch(32, 8, 1), 128: Launch(32, 8, 1), 256: Launch(16, 8, 1)}
TABLE["chunk_states_backward_kernel, per channel", "large"] = {
    64: Launch(32, 8, 2),
    128: Launch(32, 8, 2),
    256: Launch(16, 8, 1),
}
TABLE["chunk_states_backward_kernel, per channel", "small"] = {
    64: Launch(32, 8, 1),
    128: Launch(32, 8, 1),
    256: Launch(16, 8, 1),
}
# Without the delta rule it is the work of `chunk_states`, on as large tiles.
for key in ("chunk_states_backward_kernel, additive", "chunk_states_backward_kernel, additive, per channel"):
    TABLE[key, "large"] = {64: Launch(64, 4, 2), 128: Launch(32, 8, 2), 256: Launch(32, 8, 2)}
    TABLE[key, "small"] = {64: Launch(32, 4, 1), 128: Launch(32, 4, 1), 256: Launch(16, 8, 1)}
TABLE["chunk_states_backward_kernel, additive", "hopper"] = {
    64: Launch(64, 4, 2),
    128: Launch(64, 8, 2),
    256: Launch(32, 8, 2),
}
TABLE["chunk_states_backward_kernel, additive, per channel", "hopper"] = {
    64: Launch(64, 4, 2),
    128: Launch(64, 4, 2),
    256: Launch(64, 8, 2),
}


def chunk_states_backward(
    do: Tensor,
    dv_new: Tensor | None,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    G: Tensor | None,
    scale: float,
    segment: Segment,
) -> Tensor:
    """The gradient of the state leaving each chunk, `[M, HV, K, V]` in the dtype of q; dstate, that of the final
    states, becomes that of the initial ones.

    With the delta rule, dv_new, from the chunk's outputs alone so far, becomes du. Without, what is written does not
    depend on the state: there is no w, and neither dv_new nor k is looked at.
    """
    H, K = q.shape[2:]
    HV, V = do.shape[2:]
    dstates = q.new_empty(segment.chunks, HV, K, V)
    per_channel = G is not None and G.dim() == 4
    key = "chunk_states_backward_kernel" + ", additive" * (w is None) + ", per channel" * per_channel
    entry = launch(key, q, K)
    block = min(entry.block, padded(V))
    chunk_states_backward_kernel[segment.sequences, HV, blocks(V, block)](
        do, dv_new, dstate, dstates, q, k, w, G, scale, segment.bounds, segment.first_chunk, segment.length, H, HV,
        K=K, V=V, BLOCK_K=padded(K), BLOCK_V=block, PER_CHANNEL=per_channel,
        num_warps=entry.warps, num_stages=entry.stages,
    )  # fmt: skip
    return dstates


@kernel
def chunk_states_backward_kernel(
    do, dv_new, dstate, dstates, q, k, w, G, scale, bounds, first_chunk, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """du = dv' + (K e^{G_C - G}) dS,    dS <- Diag(e^{G_C}) dS + scale (Q e^G)^T dO - w^T du,    last chunk first.

    A program owns BLOCK_V columns of dS of one value head, and keeps them in registers with all K rows. What is stored
    is dS of the state that leaves the chunk, from before the update. Without `w` there is no du.
    """
    n, head = tl.program_id(0), tl.program_id(1)
    shared_head = head // (HV // H)
    first, last = sequence_chunks(n, first_chunk, T)
    start, end = sequence_tokens(first, last, bounds, T)
    i, row = tl.arange(0, C), tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = row[:, None] * V + column[None, :]
    mask = (row < K)[:, None] & (column < V)[None, :]
    dstate += (tl.cast(n, tl.int64) * HV + head) * K * V + tile
    dstates += (first * HV + head) * K * V + tile
    dS = tl.load(dstate, mask=mask, other=0.0)
    chunks = tl.cast(last - first, tl.int32)

    for step in range(0, chunks):
        m = chunks - 1 - step
        token = start + m * C  # the first of the chunk
        length = tl.minimum(end - token, C).to(tl.int32)
        leaving = dS.to(q.dtype.element_ty)
        tl.store(dstates + tl.cast(m, tl.int64) * HV * K * V, leaving, mask=mask)
        queries = load_tokens(q + token * H * K, i, length, shared_head, H, row, K)
        outputs = load_tokens(do + token * HV * V, i, length, head, HV, column, V)
        if w is not None:
            keys = load_tokens(k + token * H * K, i, length, shared_head, H, row, K)
            du = load_tokens(dv_new + token * HV * V, i, length, head, HV, column, V).to(tl.float32)

        # Beyond `end` G reads 0: the exponents are 0 and G_C there, on rows that are 0.
        if PER_CHANNEL:
            gates = G + token * HV * K
            G_end = tl.load(gates + ((length - 1) * HV + head) * K + row, mask=row < K, other=0.0)
            g = load_tokens(gates, i, length, head, HV, row, K)
            if w is not None:
                keys = (keys.to(tl.float32) * tl.exp(G_end[None, :] - g)).to(leaving.dtype)
                du = dot(keys, leaving, du)
            queries = (queries.to(tl.float32) * (tl.exp(g) * scale)).to(leaving.dtype)
            dS *= tl.exp(G_end)[:, None]
        elif G is not None:
            gates = G + token * HV
            G_end = tl.load(gates + (length - 1) * HV + head)
            g = load_gates(gates, i, length, head, HV)
            if w is not None:
                du += dot(keys, leaving) * tl.exp(G_end - g)[:, None]
            outputs = (outputs.to(tl.float32) * (tl.exp(g) * scale)[:, None]).to(leaving.dtype)
            dS *= tl.exp(G_end)
        else:
            if w is not None:
                du = dot(keys, leaving, du)
            outputs = (outputs.to(tl.float32) * scale).to(leaving.dtype)
        dS = dot(tl.trans(queries), outputs, dS)

        if w is not None:
            du = du.to(leaving.dtype)
            store_tokens(dv_new + token * HV * V, du, i, length, head, HV, column, V)
            dS = dot(load_channels(w + token * HV * K, i, length, head, HV, row, K), -du, dS)
    tl.store(dstate, dS, mask=mask)
