"""Scores under a decay per key channel, in Triton: against the PyTorch pass in float64, and against the plain formula,
which takes every exponent pair by pair, and its gradients by autograd."""

import pytest
import torch
from compare import assert_close
from torch.nn import functional as F

from lm_zoo.kernels.linear_attention import torch_passes
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH as C
from lm_zoo.kernels.linear_attention.triton_passes.channel_scores import channel_scores, channel_scores_backward
from lm_zoo.kernels.linear_attention.triton_passes.decay import cumulative_decay
from lm_zoo.kernels.linear_attention.triton_passes.segment import cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
# Log decays per token, from draws u in [0, 1]. Sums of strong ones are large, and float32 keeps their differences to a
# part of the sum: what is left of 1e-3.
DECAYS = {
    "slow": lambda u: -0.02 * u,
    "fast": lambda u: -2.0 * u,
    "strong": lambda u: torch.full_like(u, -50.0),
    "mixed": lambda u: torch.where(u < 0.3, -50.0 * u, -0.05 * u),
    "resets": lambda u: torch.where(u < 0.05, -torch.inf, -0.5 * u),
}


class Call:
    """The arguments of both passes, as the kernels take them: in `[B, T, H, D]`, rounded to `dtype`."""

    def __init__(self, decay, delta, dtype, *, T, B=1, H=1, HV=2, K=16, lengths=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.delta, self.lengths = delta, [T] * B if lengths is None else lengths
        self.q, self.k = draw(B, T, H, K).to(dtype), F.normalize(draw(B, T, H, K), dim=-1).to(dtype)
        cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        self.segment = cut(self.q, self.q, cu_seqlens)
        self.torch_segment = torch_passes.cut(self.q.double(), draw(B, T, HV, 1).double(), cu_seqlens).segments[0]
        u = torch.rand(B, T, HV, K, generator=generator).to(DEVICE)
        self.G = cumulative_decay(DECAYS[decay](u), self.segment)
        lower = self.positions()[..., None] >= torch.arange(C, device=DEVICE)
        self.dA_qk = (draw(B, T, HV, C) * lower).to(dtype)
        self.dA_kk = (draw(B, T, HV, C) * lower).to(dtype) if delta else None

    def positions(self):
        """`[B, T, 1]`, of each token in its chunk."""
        position = torch.cat([torch.arange(length) % C for length in self.lengths])
        return position.view(*self.q.shape[:2], 1).to(DEVICE)

    def triton_scores(self):
        return channel_scores(self.q, self.k, self.G, SCALE, self.segment, delta=self.delta)

    def triton_gradients(self):
        """dq, dk and dG."""
        sums = [torch.zeros_like(self.G) for _ in range(3)]
        channel_scores_backward(self.dA_qk, self.dA_kk, self.q, self.k, self.G, SCALE, *sums, self.segment)
        return sums

    def torch_inputs(self):
        heads = self.G.shape[2]
        q, k, G = (self.torch_segment.split(x.double(), heads) for x in (self.q, self.k, self.G))
        return q, k, G.cummin(2)[0]  # what fills the last chunk keeps the state

    def join(self, x):
        return self.torch_segment.join(x, None, self.G.shape[2], torch.float64)

    def torch_scores(self):
        found = torch_passes.chunk_scores(*self.torch_inputs(), SCALE, self.torch_segment, delta=self.delta)
        return [None if x is None else self.join(x) for x in found]

    def torch_gradients(self):
        q, k, G = self.torch_inputs()
        heads, sums = G.shape[1], [torch.zeros_like(x) for x in (q, k, G)]
        dA_qk = self.torch_segment.split(self.dA_qk.double(), heads)
        dA_kk = self.torch_segment.split(self.dA_kk.double(), heads).tril_(-1) if self.delta else None
        torch_passes.chunk_scores_backward(dA_qk, dA_kk, q, k, G, None, None, SCALE, *sums, self.torch_segment)
        return [self.join(x) for x in sums]

    def plain_scores(self, q, k, G):
        """sum_d x_id k_jd e^{G_id - G_jd} of every pair of a chunk, in the dtype of the arguments."""
        parts = []
        for x in (q, k):
            scores = x.new_zeros(*x.shape[:3], C)
            rows = []
            for first, length in self.chunks():
                b, t = divmod(first, q.shape[1])
                xs, ks, Gs = (y[b, t : t + length].transpose(0, 1) for y in (x, k, G))
                later = torch.ones(length, length, dtype=torch.bool, device=G.device).tril(-1)[..., None]
                exponent = torch.where(later, Gs[:, :, None] - Gs[:, None], 0.0)
                pairs = torch.einsum("hid,hjd,hijd->hij", xs, ks, exponent.exp())
                rows.append(F.pad(pairs.tril(0 if x is q else -1), (0, C - length)).transpose(0, 1))
            parts.append(torch.cat(rows).view_as(scores))
        return parts[0] * SCALE, parts[1]

    def chunks(self):
        """First token and length of each chunk, of B T tokens."""
        first = 0
        for length in self.lengths:
            for start in range(0, length, C):
                yield first + start, min(C, length - start)
            first += length

    def plain_gradients(self):
        groups = self.G.shape[2] // self.q.shape[2]
        inputs = [x.double().repeat_interleave(groups, 2) for x in (self.q, self.k)] + [self.G.double()]
        inputs = [x.requires_grad_() for x in inputs]
        scores = self.plain_scores(*inputs)
        gradients = [self.dA_qk, self.dA_kk] if self.delta else [self.dA_qk]
        return torch.autograd.grad(scores[: len(gradients)], inputs, [x.double() for x in gradients])

    def decay_gradient(self, dG):
        """Of the log decays: the sum of dG from each token to the end of its chunk."""
        rows = dG.flatten(0, 1)
        return torch.cat([rows[at : at + n].flip(0).cumsum(0).flip(0) for at, n in self.chunks()])


def check(call, dtype):
    tolerance = TOLERANCE[dtype]
    A_qk, A_kk = call.triton_scores()
    assert A_qk.dtype == dtype
    expected = call.torch_scores()
    assert_close(A_qk, expected[0].to(dtype), tolerance, "A_qk")
    assert (A_kk is None) == (not call.delta)
    if call.delta:
        assert A_kk.dtype == torch.float32
        assert_close(A_kk, expected[1].to(dtype), tolerance, "A_kk")
    actual, by_twin, by_autograd = call.triton_gradients(), call.torch_gradients(), call.plain_gradients()
    for name, x, twin, plain in zip(("dq", "dk", "dG"), actual, by_twin, by_autograd, strict=True):
        # In `dtype`: float16 has no room for what a strong decay leaves.
        assert_close(x, twin.to(dtype), tolerance, name)
        assert_close(x, plain.to(dtype), tolerance, f"{name} (plain formula)")
    dlog_decay, expected = call.decay_gradient(actual[2]), call.decay_gradient(by_autograd[2])
    assert_close(dlog_decay, expected.to(dtype), tolerance, "gradient of the log decay")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
def test_twins(decay, delta, dtype):
    check(Call(decay, delta, dtype, T=77, HV=1), dtype)


SHAPES = {
    "grouped": {"T": 33, "H": 2, "HV": 4, "B": 2},
    "K 24": {"T": 17, "HV": 1, "K": 24},
    "K 80": {"T": 19, "HV": 1, "K": 80},
    "one token": {"T": 1},
    "packed": {"T": 71, "HV": 1, "lengths": [3, 0, 66, 1, 1]},
    "packed, empty ends": {"T": 5, "lengths": [0, 5, 0]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(Call("mixed", True, torch.float32, **SHAPES[shape]), torch.float32)


def test_gradients_are_added():
    call = Call("fast", True, torch.float32, T=9)
    sums = [torch.full_like(call.G, value) for value in (1.0, -2.0, 3.0)]
    before = [x.clone() for x in sums]
    channel_scores_backward(call.dA_qk, call.dA_kk, call.q, call.k, call.G, SCALE, *sums, call.segment)
    for after, held, found in zip(sums, before, call.triton_gradients(), strict=True):
        assert_close(after - held, found, 1e-5)


def test_only_the_lower_triangle_of_gradients_is_looked_at():
    call = Call("fast", True, torch.float32, T=20)
    expected = call.triton_gradients()
    above = call.positions()[..., None] < torch.arange(C, device=DEVICE)
    on = call.positions()[..., None] == torch.arange(C, device=DEVICE)
    call.dA_qk = call.dA_qk.masked_fill(above, torch.nan)
    call.dA_kk = call.dA_kk.masked_fill(above | on, torch.nan)
    for actual, wanted in zip(call.triton_gradients(), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_scores_are_zero_above_the_diagonal():
    call = Call("strong", True, torch.float32, T=20)
    A_qk, A_kk = call.triton_scores()
    position, column = call.positions()[..., None], torch.arange(C, device=DEVICE)
    assert not A_qk[(position < column).expand_as(A_qk)].any()
    assert not A_kk[(position <= column).expand_as(A_kk)].any()


def test_a_sequence_does_not_depend_on_what_it_is_packed_with():
    packed = Call("mixed", True, torch.float32, T=80, lengths=[10, 70])
    alone = Call("mixed", True, torch.float32, T=70)
    for name in ("q", "k", "G", "dA_qk", "dA_kk"):
        setattr(alone, name, getattr(packed, name)[:, 10:].contiguous())
    results = [(*call.triton_scores(), *call.triton_gradients()) for call in (packed, alone)]
    for in_batch, single in zip(*results, strict=True):
        assert torch.equal(in_batch[:, 10:], single)


def test_rounding_of_pairs_cancels_in_the_gradient_of_the_decay():
    """What a pair adds to dG at one token and takes at the other must be the same number, though the products are in
    float16: else the rounding of all pairs of the chunk adds up in the first decays, whose gradients have few terms."""
    call = Call("fast", True, torch.float16, T=64, HV=1, K=32)
    early = [call.decay_gradient(dG)[1:4] for dG in (call.triton_gradients()[2], call.plain_gradients()[2])]
    assert_close(*early, 5e-4, "gradient of the first log decays")
