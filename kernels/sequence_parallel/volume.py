"""The bytes that a layer on shared sequences takes in on one rank, in one forward and one backward pass.

On the busiest rank, one with neighbours on both sides where there are that many: the others receive as much or less.
"""

from dataclasses import dataclass

from lm_zoo.kernels.checks import check_option
from lm_zoo.kernels.sequence_parallel.group import FORMS


@dataclass(frozen=True)
class Messages:
    """What a layer has to say about a segment, in bytes.

    Attributes:
        state: E, what a segment leaves.
        transition: M, what it makes of the state that enters.
        tail: the last tokens of a convolution or a window, for each segment that they lie in.
        keys: keys and values of softmax attention, per token.
    """

    state: int = 0
    transition: int = 0
    tail: int = 0
    keys: int = 0


def received(form: str, ranks: int, tokens: int, messages: Messages) -> int:
    """Bytes for a sequence of so many `tokens`, by "all_gather" or by "ring".

    The gradient of what is gathered is gathered, too, or summed where it belongs, which is as much; M goes along, as no
    rank keeps it. Keys are gathered in both forms.
    """
    check_option("form", form, FORMS)
    neighbours = min(ranks - 1, 2)  # one sends its state forward, the other its gradient back
    gathered = 2 * (ranks - 1) * (messages.state + messages.transition)
    states = {"ring": neighbours * messages.state, "all_gather": gathered}[form]
    keys = 2 * (ranks - 1) * (tokens // ranks) * messages.keys
    return states + neighbours * messages.tail + keys


def received_by_ring_attention(ranks: int, tokens: int, keys: int) -> int:
    """The same of ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values of `keys` bytes per token.

    They go round once in the forward pass, and once more in the backward pass with their gradients, here in the same
    precision.
    """
    return 3 * (ranks - 1) * (tokens // ranks) * keys
