"""Log-likelihoods of ends of sequences, where a common prefix of sequences is read once and its state forked.

log p(x_first .. x_{n-1} | x_0 .. x_{first-1}) = sum_{t = first}^{n-1} log p(x_t | x_0 .. x_{t-1})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_zoo.eval.harness.memory import check_memory
from lm_zoo.eval.harness.readers import TransformerReader, ZooReader
from lm_zoo.eval.harness.tree import SHORTEST, Node, context_tree, prefix_tree

LOGIT_ROWS = 1024  # rows of logits that are computed at a time
Reader = ZooReader | TransformerReader


@dataclass
class Scored:
    """The end of a sequence that is asked for: `tokens[first:]`, with at least one token before it."""

    tokens: list[int]
    first: int


@dataclass
class Work:
    """What an evaluation took: tokens of all texts, and those that the model read."""

    asked: int = 0
    read: int = 0


def walk(
    reader: Reader,
    sequences: Sequence[list[int]],
    *,
    batch_size: int,
    keep_ends: bool,
    wanted: Callable[[Node], list[int]],
    work: Work,
    prefixes: Sequence[int] | None = None,
) -> Iterator[tuple[list[Node], object, Tensor]]:
    """Reads every node of the sequences' tree once, at most `batch_size` texts at a time and the longest first.

    Yields nodes, the memory after them (of leaves only with `keep_ends`) and the features at `wanted(node)`, positions
    counted from the start of the sequence, for one node after the other. What a batch leads to is read before the next
    batch, so that no more than one batch per level of the tree is kept. With `prefixes` the first so many tokens of
    each sequence see all of each other, which leaves only whole prefixes to be shared.
    """
    shortest = SHORTEST if reader.shares else max(map(len, sequences), default=0) + 1
    roots = prefix_tree(sequences, shortest) if prefixes is None else context_tree(sequences, prefixes)
    device = reader.model.device
    work.asked += sum(map(len, sequences))

    def visit(nodes: list[tuple[Node, int]], memory) -> Iterator[tuple[list[Node], object, Tensor]]:
        for batch in _batches(nodes, batch_size, reader.ragged, keep_ends):
            rows = [sequences[node.members[0]][node.start : node.end] for node, _ in batch]
            positions = [[place - node.start for place in wanted(node)] for node, _ in batch]
            check_memory(reader.model, len(rows), max(map(len, rows)), max(map(len, positions)))
            index = torch.tensor([row for row, places in enumerate(positions) for _ in places], dtype=torch.long)
            place = torch.tensor([place for places in positions for place in places], dtype=torch.long)
            past = None
            if memory is not None:
                past = memory.select(torch.tensor([row for _, row in batch], device=device))
            keep = keep_ends or any(node.children for node, _ in batch)
            options = {"prefix": True} if prefixes is not None and past is None else {}
            after, features = reader.read(past, rows, (index.to(device), place.to(device)), keep=keep, **options)
            work.read += sum(map(len, rows))
            yield [node for node, _ in batch], after, features
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from visit(children, after)

    yield from visit([(node, 0) for node in roots], None)


def _batches(
    nodes: list[tuple[Node, int]], batch_size: int, ragged: bool, keep_ends: bool
) -> Iterator[list[tuple[Node, int]]]:
    """Nodes that are read together: of similar length, and of one length if others follow that need it."""
    groups: dict[int, list[tuple[Node, int]]] = {}
    for node, row in nodes:
        kept = bool(node.children) or keep_ends
        groups.setdefault(-1 if not kept else 0 if ragged else node.end, []).append((node, row))
    for group in groups.values():
        group.sort(key=lambda item: item[0].start - item[0].end)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


@torch.inference_mode()
def score(
    reader: Reader,
    requests: Sequence[Scored],
    *,
    batch_size: int,
    work: Work,
    prefix: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """For each request its log-likelihood in nats, and whether greedy decoding would write it.

    prefix: whether all before `first` is a prefix whose tokens see each other.
    done: is told how many more requests have got their answer.
    """
    inputs = [request.tokens[:-1] for request in requests]
    total = torch.zeros(len(requests), dtype=torch.float64)
    wrong = torch.zeros(len(requests), dtype=torch.float64)

    def asked(node: Node) -> Iterator[tuple[int, int]]:
        """Members and positions of the inputs whose next token counts."""
        for member in node.members:
            for position in range(max(node.start, requests[member].first - 1), node.end):
                yield member, position

    steps = walk(
        reader,
        inputs,
        batch_size=batch_size,
        keep_ends=False,
        wanted=lambda node: [position for _, position in asked(node)],
        work=work,
        prefixes=[request.first for request in requests] if prefix else None,
    )
    for nodes, _, features in steps:
        owners = [(member, requests[member].tokens[place + 1]) for node in nodes for member, place in asked(node)]
        if owners:
            member, target = (torch.tensor(column) for column in zip(*owners, strict=True))
            nats, missed = _losses(reader, features, target.to(features.device))
            total.index_add_(0, member, -nats)
            wrong.index_add_(0, member, missed)
        done(sum(node.end == len(inputs[member]) for node in nodes for member in node.members))
    return [(nats, missed == 0) for nats, missed in zip(total.tolist(), wrong.tolist(), strict=True)]


def _losses(reader: Reader, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods `[n]`, and 1 where another token was likelier; both float64 on the CPU."""
    nats, missed = [], []
    for piece, goal in zip(features.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True):
        logits = reader.head(piece)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats.append(torch.nn.functional.cross_entropy(logits, goal, reduction="none").double().cpu())
        missed.append((logits.argmax(dim=-1) != goal).double().cpu())
    return torch.cat(nats), torch.cat(missed)
