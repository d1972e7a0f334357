"""Prefix linear attention: the tokens of a prefix see all of it, those after it are causal."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lm_zoo.kernels.sequence_parallel import active_group
from lm_zoo.layers.along_time import along_time
from lm_zoo.layers.base import LayerState, recur, recurrent_state
from lm_zoo.layers.checks import check_input
from lm_zoo.layers.qkv import QKVMixer


class PrefixMixer(QKVMixer):
    r"""Base of the mixers whose state after some tokens is the same in whatever order these came.

        y = layer(x, prefix_length=M)           o_t = S_{max(t, M)}^T q_t

    Prefix linear attention (JRT-RNN; Arora et al. 2024, arXiv 2407.05483): queries of the first M tokens read the state
    that all M leave, so what a question needs may stand before it. Only a state without an order can be read by tokens
    in its midst as by those after it: one that decays, or that a delta rule overwrites, would show them the end of the
    prefix best. Unlike in the paper, the prefix has no projections of its own, and each of its tokens is counted once.

    M is one number or one per text, `[B]`, or `[N]` with `cu_seqlens`; it counts from the first token of the call, and
    a prefix is given in one call. What a state holds before it is read as always. A subclass takes `prefix`, `[B, T]`,
    as an argument of `mix` and hands it to `recur_prefix`.
    """

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
    ) -> Tensor:
        check_input(x, self.hidden_size, state, cu_seqlens)
        prefix = None if prefix_length is None else prefix_tokens(prefix_length, x, cu_seqlens)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.mix(q, k, v, x, state=state, cu_seqlens=cu_seqlens, prefix=prefix))


@along_time("v")
def recur_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    prefix: Tensor | None,
    scale: float | None = None,
    state: LayerState | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`recur`, whose queries read all of the prefix where `prefix` `[B, T]` is true; in two passes.

    The first pass writes the prefix and nothing else, the second the rest, and its outputs count.
    """
    if prefix is None:
        return recur(q, k, v, log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        S = recurrent_state(rows, v.shape[2], q.shape[3], v.shape[3], q.device, q.dtype)
    else:
        S = state["S"]
        if state.journal is not None:  # a prefix changes what is read, not what is written in the end
            state.record("S", functools.partial(recur, scale=scale, cu_seqlens=None), q, k, v, log_decay)
    state = LayerState({"S": S})  # the same tensor, of which the two passes keep no record
    for silent in (~prefix[..., None, None], prefix[..., None, None]):
        decay = None if log_decay is None else log_decay.masked_fill(silent, 0)
        o = recur(q, k.masked_fill(silent, 0), v, decay, scale=scale, state=state, cu_seqlens=cu_seqlens)
    return o


def prefix_tokens(prefix_length: int | Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which tokens of x `[B, T, ...]` are in the prefix of their text, `[B, T]`."""
    if active_group() is not None:
        raise ValueError(
            "prefix_length is not for texts that ranks share: leave it out, or the sequence_parallel block"
        )
    (rows, length), device = x.shape[:2], x.device
    if cu_seqlens is None:
        starts, sizes = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([length], device=device)
    else:
        rows, starts, sizes = cu_seqlens.numel() - 1, cu_seqlens[:-1], cu_seqlens.diff()
    lengths = check_prefix(prefix_length, rows, device)
    on_host = device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere looking would stall the device
    if on_host and not ((lengths >= 0) & (lengths <= sizes)).all():
        raise ValueError(
            f"prefix_length must be from 0 to the tokens of each text in this call, {sizes.tolist()}, got "
            f"{lengths.tolist()}"
        )
    tokens = torch.arange(length, device=device)
    if cu_seqlens is None:
        return (tokens < lengths[:, None]).expand(x.shape[:2])
    text = torch.searchsorted(cu_seqlens, tokens, right=True) - 1  # `right`: empty texts own no token
    return (tokens - starts[text] < lengths[text])[None]


def check_prefix(prefix_length: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """`prefix_length` as whole numbers, one for every text."""
    if isinstance(prefix_length, int) and not isinstance(prefix_length, bool):
        return torch.full((rows,), prefix_length, device=device)
    kind = prefix_length.dtype if isinstance(prefix_length, Tensor) else type(prefix_length).__name__
    if kind not in (torch.int32, torch.int64):
        raise TypeError(
            f"prefix_length must be a whole number, or an integer tensor with one for each text, got {kind}"
        )
    if prefix_length.shape != (rows,):
        raise ValueError(
            f"prefix_length must have one number for each of {rows} texts, got {list(prefix_length.shape)}"
        )
    return prefix_length.to(device)
