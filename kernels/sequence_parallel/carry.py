r"""The state that reaches each segment: a scan over the ranks, forward and, for its gradient, backward.

    S_in(r + 1) = M_r S_in(r) + E_r        S_in(0): the initial state

M is what a segment's decays (and delta rules) make of the state that enters it, E the state that it leaves when none
does. With X(r) the gradient of the state leaving segment r, the gradient runs the other way by the same scan,

    X(r - 1) = M_r^T X(r) + dS_in(r)        dE_r = X(r)        dM_r = X(r) S_in(r)^T

so each pass is one exchange: of (M, E) and of (M^T, dS_in).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_zoo.kernels.sequence_parallel.group import SequenceGroup

RING_BLOCKS = 8  # parts of the last dimension of a state, V of a matrix: a rank works on one while the next travels


class Product:
    """S -> M * S + E, M broadcast to S; `None` is 1."""

    empty = 0.0

    @staticmethod
    def apply(M: Tensor | None, S: Tensor, E: Tensor) -> Tensor:
        return S + E if M is None else torch.addcmul(E, M, S)

    @staticmethod
    def adjoint(M: Tensor, S: Tensor, E: Tensor) -> Tensor:
        return M.conj()

    @staticmethod
    def gradients(X: Tensor, M: Tensor, S: Tensor, E: Tensor) -> tuple[Tensor | None, Tensor]:
        return (X * S.conj()).sum_to_size(M.shape), X


class Matrix:
    """S -> M @ S + E."""

    empty = 0.0

    @staticmethod
    def apply(M: Tensor, S: Tensor, E: Tensor) -> Tensor:
        return M @ S + E

    @staticmethod
    def adjoint(M: Tensor, S: Tensor, E: Tensor) -> Tensor:
        return M.mT

    @staticmethod
    def gradients(X: Tensor, M: Tensor, S: Tensor, E: Tensor) -> tuple[Tensor | None, Tensor]:
        return X @ S.mT, X


class LogSum:
    """S -> log(exp(M + S) + exp(E)); M is 0 or -inf and has no gradient. Its adjoint is a `Product`."""

    empty = -torch.inf

    @staticmethod
    def apply(M: Tensor, S: Tensor, E: Tensor) -> Tensor:
        return torch.logaddexp(M + S, E)

    @staticmethod
    def adjoint(M: Tensor, S: Tensor, E: Tensor) -> Tensor:
        return (M + S - LogSum.apply(M, S, E)).exp()

    @staticmethod
    def gradients(X: Tensor, M: Tensor, S: Tensor, E: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, X * (E - LogSum.apply(M, S, E)).exp()


Law = type[Product] | type[Matrix] | type[LogSum]


def scan_ranks(
    group: SequenceGroup, M: Tensor | None, E: Tensor, start: Tensor | None, law: Law, *, reverse: bool = False
) -> _Gather | _Ring:
    """S_in of this rank, as its `result()`, from now on under way. In reverse, `start` comes after the last rank."""
    return (_Gather if group.form == "all_gather" else _Ring)(group, M, E, start, law, reverse)


class _Gather:
    """Every rank gets all M and E in one message each, and runs through those before its own."""

    def __init__(self, group, M, E, start, law, reverse):
        self.group, self.start, self.law, self.reverse = group, start, law, reverse
        self.shapes = [None if M is None else M.shape, E.shape]
        parts = [E.flatten()] if M is None else [M.flatten(), E.flatten()]
        self.rows, self.work = group.gather(torch.cat(parts))

    def result(self) -> Tensor:
        self.work.wait()
        M_shape, E_shape = self.shapes
        S = self.rows.new_full(E_shape, self.law.empty) if self.start is None else self.start
        rank, size = self.group.rank, self.group.size
        for row in range(size - 1, rank, -1) if self.reverse else range(rank):
            message = self.rows[row]
            M = None if M_shape is None else message[: M_shape.numel()].view(M_shape)
            S = self.law.apply(M, S, message[-E_shape.numel() :].view(E_shape))
        return S


class _Ring:
    """The state goes from rank to rank in blocks of its last dimension; M stays where it is."""

    def __init__(self, group, M, E, start, law, reverse):
        self.group, self.law = group, law
        self.before, self.after = (group.rank + 1, group.rank - 1) if reverse else (group.rank - 1, group.rank + 1)
        self.blocks = [(_columns(law, M, E, columns), E[..., columns]) for columns in _blocks(E.shape[-1])]
        self.sent = []
        if 0 <= self.before < group.size:
            self.arriving = [group.receive(block, self.before) for _, block in self.blocks]
        else:
            first = torch.full_like(E, law.empty) if start is None else start
            self.arriving = [(first[..., columns], None) for columns in _blocks(E.shape[-1])]
            self._pass_on()

    def _pass_on(self) -> None:
        for (state, work), (M, E) in zip(self.arriving, self.blocks, strict=True):
            if work is not None:
                work.wait()
            if 0 <= self.after < self.group.size:
                self.sent.append(self.group.send(self.law.apply(M, state, E), self.after))

    def result(self) -> Tensor:
        if 0 <= self.before < self.group.size:
            self._pass_on()
        for work in self.sent:
            work.wait()
        return torch.cat([state for state, _ in self.arriving], dim=-1)


def _blocks(size: int) -> list[slice]:
    width = -(-size // RING_BLOCKS)
    return [slice(start, start + width) for start in range(0, size, width)]


def _columns(law: Law, M: Tensor | None, E: Tensor, columns: slice) -> Tensor | None:
    """What of M acts on these columns of E: all of a matrix, and all of what has one column for all of E's."""
    return M if M is None or law is Matrix or M.shape[-1] == 1 else M[..., columns]


class Carry:
    """S_in as a function of M, E and the initial state, in two halves, so that work can be done in between.

        carry = Carry(group, M, E, start, Product)
        ...                                            what does not need S_in; likewise in the backward pass
        S_in = carry.arrive()

    The gradient of `start`, which every rank has, comes out at the first rank alone.
    """

    def __init__(self, group: SequenceGroup, M: Tensor, E: Tensor, start: Tensor | None, law: Law):
        self.group, self.law = group, law
        self.inputs = (M.detach(), E.detach())
        self.token = _Depart.apply(self, M, E, start)

    def arrive(self) -> Tensor:
        return _Arrive.apply(self, self.token, *self.inputs)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carry, M, E, start):
        ctx.carry, ctx.starts = carry, start is not None
        start = None if start is None else start.to(E.dtype).expand_as(E)
        carry.scan = scan_ranks(carry.group, M, E, start, carry.law)
        return torch.zeros((), device=E.device)  # stands for what is under way

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        group, law = ctx.carry.group, ctx.carry.law
        scan, adjoint, dS, M, S, E = ctx.carry.returning
        ctx.carry.returning = None
        X = scan.result()
        dM, dE = law.gradients(X, M, S, E)
        dstart = None
        if ctx.starts:
            reached = dS + (adjoint @ X if law is Matrix else adjoint * X)
            dstart = reached if group.rank == 0 else torch.zeros_like(reached)
        return None, dM, dE, dstart


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carry, token, M, E):
        S = carry.scan.result()
        carry.scan = None
        ctx.carry = carry
        ctx.save_for_backward(M, E, S)
        return S.clone()  # the initial state itself, at the first rank

    @staticmethod
    @once_differentiable
    def backward(ctx, dS):
        carry, (M, E, S) = ctx.carry, ctx.saved_tensors
        adjoint = carry.law.adjoint(M, S, E)
        law = Matrix if carry.law is Matrix else Product
        scan = scan_ranks(carry.group, adjoint, dS.contiguous(), None, law, reverse=True)
        carry.returning = (scan, adjoint, dS, M, S, E)
        return None, torch.zeros((), device=dS.device), None, None
