"""The ops on four ranks that are threads of one process: quick, where what crosses several segments shows at once."""

import threading
from queue import Queue

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from lm_zoo.kernels import linear_attention, linear_scan, selective_scan
from lm_zoo.kernels.sequence_parallel import SequenceGroup
from lm_zoo.kernels.sequence_parallel.group import FORMS
from lm_zoo.kernels.sequence_parallel.recurrences import (
    linear_attention_segment,
    linear_scan_segment,
    selective_scan_segment,
)

SIZE, T = 4, 24
BOUNDS = torch.tensor([0, 0, 3, 3, 9, 9, 20, 21, 24])  # in segments of 6: one ends and one starts in the second


class Work:
    def __init__(self, buffer: Tensor | None = None, queue: Queue | None = None):
        self.buffer, self.queue = buffer, queue

    def wait(self) -> None:
        if self.queue is not None:
            self.buffer.copy_(self.queue.get(timeout=60))


class Rank(SequenceGroup):
    """One of the threads: messages go through memory."""

    def __init__(self, rank: int, form: str, shared: dict):
        self.rank, self.size, self.form, self.shared = rank, SIZE, form, shared

    def check_length(self, length: int, device: torch.device) -> None:
        pass

    def all(self, x: Tensor) -> list[Tensor]:
        self.shared["slots"][self.rank] = x.detach().resolve_conj().clone()
        self.shared["barrier"].wait()
        found = list(self.shared["slots"])
        self.shared["barrier"].wait()
        return found

    def gather(self, x: Tensor) -> tuple[Tensor, Work]:
        return torch.stack(self.all(x)), Work()

    def send(self, x: Tensor, rank: int) -> Work:
        self.shared["queues"][self.rank, rank].put(x.detach().clone())
        return Work()

    def receive(self, like: Tensor, rank: int) -> tuple[Tensor, Work]:
        buffer = torch.empty_like(like)
        return buffer, Work(buffer, self.shared["queues"][rank, self.rank])

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.all(x)).sum(0)


def on_ranks(form: str, run) -> list:
    """What `run(rank)` returns on each of them."""
    queues = {(a, b): Queue() for a in range(SIZE) for b in range(SIZE)}
    shared = {"slots": [None] * SIZE, "barrier": threading.Barrier(SIZE, timeout=60), "queues": queues}
    found = [None] * SIZE

    def work(rank: int) -> None:
        try:
            found[rank] = run(Rank(rank, form, shared))
        except BaseException as error:
            found[rank] = error
            shared["barrier"].abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def inputs(kind: str) -> tuple:
    """The op, its function for a segment, its arguments, and the shape of its states."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if kind == "scan":
        decay = torch.polar(randn(1, T, 5).tanh().abs(), randn(1, T, 5))
        x = torch.complex(randn(1, T, 5), randn(1, T, 5))
        return linear_scan, linear_scan_segment, {"x": x, "decay": decay}, (5,), {"reverse": False}
    if kind == "selective":
        x = {"x": randn(1, T, 5), "dt": randn(1, T, 5).abs(), "A": -randn(5, 3).abs()}
        x |= {"B": randn(1, T, 3), "C": randn(1, T, 3), "D": randn(5), "z": randn(1, T, 5)}
        return selective_scan, selective_scan_segment, x, (5, 3), {}
    x = {"q": randn(1, T, 1, 4), "k": F.normalize(randn(1, T, 1, 4), dim=-1), "v": randn(1, T, 2, 3)}
    x["log_decay"] = {"none": None, "scalar": -randn(1, T, 2).abs()}.get(kind, -randn(1, T, 2, 4).abs())
    x["beta"] = 2 * randn(1, T, 2).sigmoid() if kind == "delta" else None
    return linear_attention, linear_attention_segment, x, (2, 4, 3), {"scale": None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "scalar", "channel", "delta", "scan", "selective"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
def test_four_threads_equal_one(form, kind, packed, states):
    op, segment_op, arguments, shape, extra = inputs(kind)
    some = next(iter(arguments.values()))
    rows = len(BOUNDS) - 1 if packed else 1
    initial = torch.ones(rows, *shape, dtype=some.dtype).cumsum(0) if states else None
    options = {"output_final_state": states, "cu_seqlens": BOUNDS if packed else None, "backend": "torch"} | extra

    def run(rank: Rank | None):
        leaves = {name: x.clone().requires_grad_() for name, x in arguments.items() if x is not None}
        given = dict.fromkeys(arguments) | leaves
        start = None if initial is None else initial.clone().requires_grad_()
        leaves = list(leaves.values()) + ([] if start is None else [start])
        if rank is None:
            y, final = op(**given, initial_state=start, **options)
        else:
            along_time = {name for name, x in given.items() if x is not None and x.dim() > 2}
            given |= {name: rank.segment(given[name]) for name in along_time}
            y, final = segment_op(op, rank, **given, initial_state=start, **options)
        weights = torch.arange(T, dtype=torch.float64).cos().view(1, T, *[1] * (y.dim() - 2))
        loss = (y * (weights if rank is None else rank.segment(weights))).abs().square().sum()
        if final is not None:
            loss = loss + final.abs().square().sum() / (1 if rank is None else SIZE)
        return y.detach(), final, torch.autograd.grad(loss, leaves)

    y, final, gradients = run(None)
    found = on_ranks(form, run)
    view = torch.view_as_real if y.is_complex() else torch.Tensor.contiguous
    assert_close(view(torch.cat([part[0] for part in found], dim=1)), view(y), 1e-12, "y")
    for rank in range(SIZE if states else 0):
        assert_close(view(found[rank][1].resolve_conj()), view(final), 1e-12, "final state")
    for i, expected in enumerate(gradients):
        total = sum(part[2][i] for part in found)
        real = torch.view_as_real if expected.is_complex() else torch.Tensor.contiguous
        assert_close(real(total.resolve_conj()), real(expected.resolve_conj()), 1e-12, f"gradient {i}")
