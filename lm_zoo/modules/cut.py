"""How processes may share a module: each holds a part of its matrices and computes a part of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cut:
    """A module y = W f(V x) whose f treats groups of channels (heads) by themselves: y = sum_r W[:, r] f_r(V[r] x).

    N ranks have 1/N of the heads each, read the same x, and their outputs are summed. Names are those of submodules and
    parameters; what a module does not have is passed over. Parameters that are not named here are used by all heads:
    every rank holds them.

    Attributes:
        columns: what has its first dimension over the heads, head by head: linear maps to them, their parameters.
        row: the linear map W from all heads back, without a bias.
        sections: what has several such things one after another in its first dimension, and the size of each. Every
            rank holds all of it, and uses its part of each.
        norms: RMS norms over all heads together; the ranks add up the mean square.
        sums: linear maps, without a bias, from all heads to what all of them use.
        counts: attributes with numbers of heads, or of their channels, of which a rank has 1/N.
    """

    columns: tuple[str, ...]
    row: str = "o_proj"
    sections: dict[str, Sequence[int]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("num_heads",)
