"""What eigenvalues below zero are for: states that follow a group, exactly, by weights set by hand."""

import math

import torch
import torch.nn.functional as F
from compare import assert_close

from lm_zoo.layers import DeltaNet, DeltaProduct, Mamba2

LARGE = 100.0
START, ONE, ZERO = 0, 1, 2  # tokens: the first of a text, and bits


def by_hand(layer):
    """All weights zero, but for an output that is the normalised o, and a convolution that only sees its own token."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.norm.weight.fill_(1)
        layer.conv.weight[:, -1] = 1
    return layer


def follow(layer, ids):
    """The outputs for one-hot tokens, in one call and token by token; far from zero, SiLU is the identity."""
    x = F.one_hot(ids, layer.hidden_size)[None].to(layer.norm.weight.dtype)
    state = layer.init_state(1)
    with torch.no_grad():
        whole, steps = layer(x), torch.cat([layer(token, state=state) for token in x.split(1, dim=1)], dim=1)
    assert_close(steps, whole, 1e-5)
    return whole[0]


def bits(count):
    ids = torch.randint(1, 3, (count,), generator=torch.Generator().manual_seed(5))
    ids[0] = START
    return ids, torch.where((ids == ONE).cumsum(0) % 2 == 0, 1.0, -1.0)


def test_reflections_count_the_parity_of_bits():
    """One head with k = q = e_0: a one turns the sign of the state, (1 - 2) S, which b <= 1 cannot do."""
    ids, parity = bits(500)
    outputs = []
    for negative in (True, False):
        layer = by_hand(DeltaNet(4, 1, allow_negative_eigenvalues=negative))
        with torch.no_grad():
            layer.q_proj.weight[0, :3] = layer.k_proj.weight[0, :3] = LARGE
            layer.v_proj.weight[0, START] = 1
            layer.beta_proj.weight[0, :3] = torch.tensor([0, LARGE, -LARGE])
            layer.o_proj.weight[0, 0] = 1
        outputs.append(follow(layer, ids)[:, 0])
    torch.testing.assert_close(outputs[0] / outputs[0][0], parity)
    assert (outputs[1][ids.cumsum(0) > ONE][5:].abs() < 1e-3).all()


def test_negative_decays_count_the_parity_of_bits():
    """Mamba-2 with B = C: dt = 0 keeps the state, dt -> inf turns its sign, a = 2 exp(-dt) - 1 = -1."""
    ids, parity = bits(500)
    outputs = []
    for negative in (True, False):
        layer = by_hand(Mamba2(4, head_size=8, state_size=2, allow_negative_eigenvalues=negative))
        with torch.no_grad():
            z, value, k, q, dt = layer.in_proj.weight.split([8, 8, 2, 2, 1])
            z[:, :3] = k[:, :3] = q[:, :3] = 1
            value[:, START] = 1
            dt[0, :3] = torch.tensor([0, LARGE, -LARGE])
            layer.out_proj.weight[0, 0] = 1
        outputs.append(follow(layer, ids)[:, 0])
    torch.testing.assert_close(outputs[0] / outputs[0][0], parity)
    assert (outputs[1][(ids == ONE).cumsum(0) > 0].abs() < 1e-30).all()


def test_two_reflections_turn_a_triangle():
    """A one is two reflections at 60 degrees, so a turn by 120: its powers follow the cycle of three elements.

    One generalised Householder matrix has real eigenvalues only, a turn has not. The plane is that of channels 0 and 1;
    channel 2 keeps a value to compare with, since the norm takes away the length of o.
    """
    ids, _ = bits(300)
    layer = by_hand(DeltaProduct(4, 1, num_householders=2))
    half, height = math.cos(math.pi / 3), math.sin(math.pi / 3)
    with torch.no_grad():
        first, second = layer.k_proj.weight.split(4)
        first[0, :3] = LARGE
        second[2, START] = LARGE
        second[:2, ONE] = LARGE * torch.tensor([half, height])
        layer.v_proj.weight[0, START] = layer.v_proj.weight[5, START] = LARGE
        layer.q_proj.weight[:3, :3] = LARGE * torch.tensor([height, half, 1])[:, None]
        layer.beta_proj.weight[:, :3] = torch.tensor([0, LARGE, -LARGE])
        layer.o_proj.weight.copy_(torch.eye(4))
    y = follow(layer, ids)
    cosine = y[:, 0] / y[:, 1]  # with q, which is at 30 degrees
    angle = (ids == ONE).cumsum(0) * (2 * math.pi / 3)
    torch.testing.assert_close(cosine, torch.cos(angle - math.pi / 6), rtol=0, atol=1e-4)
    assert {round(value, 1) for value in cosine.tolist()} == {0.9, 0.0, -0.9}  # all three
