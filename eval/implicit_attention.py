r"""The attention matrix that a mixer implicitly applies.

    o_t = sum_s M_ts v_s        M `[T, T]`, lower triangular, per head, or per channel where each decays by itself

Softmax attention is written that way, and every other mixer of the zoo can be: with the gates of a text given, its
recurrence is linear in its values (Ali et al. 2024, arXiv 2403.01590; Zimerman et al. 2024, arXiv 2405.16504). Column s
of M is what comes out when the value at token s is 1 and all others are 0, so M is read off the mixer's own op.

What M holds: the scores, decays, delta rule, write strengths that multiply values inside the op, the step dt and the
skip connection D of state spaces, the denominator where there is one. What it leaves out: what comes before the values
(projection, short convolution, SiLU) and after the output (norm, gate, projection). The last could be folded in, as
Zimerman et al. do: norm and gate multiply the row of a token, in each channel by another number. That changes how much
a token takes in, not where it looks, and makes a matrix per head one per channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lm_zoo.layers.along_time import Mixing, watched
from lm_zoo.layers.base import Mixer


class ImplicitAttention(NamedTuple):
    """`matrix @ values == output`.

    Attributes:
        matrix: M, `[B, heads, T, T]`. For a mixer that works on each channel by itself the heads are its channels. A
            token of DeltaProduct has n values, one per step: `[B, heads, T, n T]`. Complex for a complex state.
        values: what M mixes, `[B, heads, T, V]`, V = 1 for channels: v of the layer's equation; in Mamba and Mamba-2
            the x or u that dt multiplies, in HGRN the input times 1 - f, in S4D the layer's input.
        output: what the layer's op gives for them, before norm, gate and output projection, `[B, heads, T, V]`.
    """

    matrix: Tensor
    values: Tensor
    output: Tensor


@torch.no_grad()
def implicit_attention(layer: Mixer, x: Tensor) -> ImplicitAttention:
    """M of a mixer reading x `[B, T, D]` from its first token, with the values it mixes and what comes out.

    The op runs T / V + 1 times (T + 1 times where channels are on their own), and M has B heads T^2 numbers: this is
    for looking at hundreds of tokens.

    Raises ValueError for a layer that does not say where it mixes along time, see `lm_zoo.layers.along_time`.
    """
    if not isinstance(layer, Mixer):
        raise TypeError(f"layer must be a mixer of lm_zoo, got {type(layer).__name__}")
    calls: list[Mixing] = []
    with watched(calls):
        layer(x)
    if len(calls) != 1:
        raise ValueError(
            f"layer must mix along time in one function, decorated by lm_zoo.layers.along_time; {type(layer).__name__} "
            f"called {len(calls)}"
        )
    return of_call(calls[0])


def of_call(mixing: Mixing) -> ImplicitAttention:
    """The same of a call that was watched."""
    values = mixing.arguments[mixing.values]
    output = mixing(values)
    by_channel = values.dim() == 3  # [B, T, D]: every channel is a head of its own

    def by_head(y: Tensor) -> Tensor:  # [B, heads, T, V]
        y = y[..., None] if by_channel else y
        return y.movedim(mixing.time, 2)

    length = values.shape[mixing.time]
    width = 1 if by_channel else values.shape[-1]
    columns = []
    for start in range(0, length, width):  # as many values as there are channels at once: channel j has token start + j
        probe = torch.zeros_like(values)
        tokens = torch.arange(start, min(start + width, length), device=values.device)
        by_head(probe)[:, :, tokens, tokens - start] = 1
        columns.append(by_head(mixing(probe))[..., : len(tokens)])
    values, output = by_head(values), by_head(output)
    if (shared := output.shape[1] // values.shape[1]) > 1:  # heads of queries that share one of values
        values = values.repeat_interleave(shared, dim=1)
    return ImplicitAttention(torch.cat(columns, dim=-1), values, output)
