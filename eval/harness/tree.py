"""Sequences as a tree of what they have in common, so that a prefix of many is read once.

the cat sat .        [the cat sat] -> [.] and [on it]
the cat sat on it    [dogs bark]
dogs bark
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHORTEST = 16  # tokens that a prefix must have to be worth a call of its own


@dataclass
class Node:
    """Tokens `[start, end)` of all sequences in `members`, which agree in everything before `end`."""

    start: int
    end: int
    members: list[int]
    children: list[Node] = field(default_factory=list)


def prefix_tree(sequences: Sequence[list[int]], shortest: int = SHORTEST) -> list[Node]:
    """The roots of the tree. Every path down is a sequence; a node with children has at least `shortest` tokens.

    A sequence that is a prefix of others ends at a node with children, or has a leaf of its own beside theirs.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    roots: list[Node] = []
    # Sequences order[low:high] agree before `agreed`, and a node above them holds what is before `start`.
    work = [(0, len(order), 0, 0, roots)] if order else []
    while work:
        low, high, start, agreed, siblings = work.pop()
        first, last = sequences[order[low]], sequences[order[high - 1]]  # of a sorted range, the two that agree least
        agreed = _agreement(first, last, agreed)
        if agreed == len(last):
            siblings.append(Node(start, agreed, order[low:high]))
            continue
        if agreed - start >= shortest:
            siblings.append(node := Node(start, agreed, order[low:high]))
            start, siblings = agreed, node.children
        for part_low, part_high, ended in _parts(sequences, order, low, high, agreed):
            if not ended:
                work.append((part_low, part_high, start, agreed, siblings))
            elif start < agreed:
                siblings.append(Node(start, agreed, order[part_low:part_high]))
    return roots


def context_tree(sequences: Sequence[list[int]], contexts: Sequence[int]) -> list[Node]:
    """A tree in which only whole contexts, the first `contexts[n]` tokens of sequence n, are read once for many."""
    found: dict[tuple[int, ...], Node] = {}
    for number, (sequence, end) in enumerate(zip(sequences, contexts, strict=True)):
        node = found.setdefault(tuple(sequence[:end]), Node(0, end, []))
        node.members.append(number)
        if end < len(sequence):
            node.children.append(Node(end, len(sequence), [number]))
    return list(found.values())


def _agreement(one: list[int], other: list[int], known: int) -> int:
    """How many tokens both begin with, of which `known` are known to agree."""
    shorter = min(len(one), len(other))
    while known < shorter and one[known] == other[known]:
        known += 1
    return known


def _parts(
    sequences: Sequence[list[int]], order: list[int], low: int, high: int, position: int
) -> Iterator[tuple[int, int, bool]]:
    """Ranges of a sorted range that have the same token at `position`, and whether they end before it."""

    def token(place: int) -> int | None:
        sequence = sequences[order[place]]
        return sequence[position] if position < len(sequence) else None

    while low < high:
        end = low + 1
        while end < high and token(end) == token(low):
            end += 1
        yield low, end, token(low) is None
        low = end
