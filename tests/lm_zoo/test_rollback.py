"""Tokens that a state has read and gives back: what is left is the state that never saw them, in every row its own."""

import itertools

import pytest
import torch
from compare import assert_close
from inner_mixers import MIXERS as INNER
from inner_mixers import Texts, call, make_mixer, start

COUNTS = ([3, 0, 5, 3], [4, 5, 1, 2], [2, 2, 2, 2], [0, 0, 0, 0], [5, 5, 5, 5])  # kept of each block, per row
CALLS = ([5], [1, 1, 1, 1, 1], [2, 1, 2], [5], [1, 4])  # how the tokens of each block come in
PROMPT, BLOCK, TAIL = 9, 5, 4


@torch.no_grad()
def check_rollback(read, state, length):
    """Blocks of which each row keeps its own number of tokens, then a few tokens, against one call without a state.

    `read(tokens, state)` reads the tokens `[4, T]`, given by their number in a text of `length`.
    """
    rows = torch.arange(PROMPT).repeat(4, 1)
    read(rows, state)
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    fresh = itertools.count(PROMPT, BLOCK)
    kept = [list(range(PROMPT)) for _ in range(4)]
    for counts, calls in zip(COUNTS, CALLS, strict=True):
        first = next(fresh) % (length - BLOCK)
        block = torch.arange(first, first + BLOCK).repeat(4, 1)
        state.begin()
        for part in block.split(calls, dim=1):
            read(part, state)
        state.keep(counts, BLOCK)
        for row, count in enumerate(counts):
            kept[row] += block[row, :count].tolist()
    if addresses.keys() != {"keys", "values", "position"}:  # those of full attention grow
        assert addresses == {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    tail = torch.arange(length - TAIL, length).repeat(4, 1)
    actual = torch.cat([read(part, state) for part in tail.split([1, TAIL - 1], dim=1)], dim=1)
    for row, tokens in enumerate(kept):
        tokens = torch.tensor(tokens + tail[row].tolist())[None]
        assert_close(actual[row], read(tokens, None)[0, -TAIL:], 1e-12, f"row {row}")


def test_layers_take_tokens_back(layer, inputs):
    x = inputs(1, 30)[0]
    check_rollback(lambda tokens, state: layer(x[tokens], state=state), layer.init_state(4), 30)


@pytest.mark.parametrize("name", INNER)
def test_inner_mixers_take_tokens_back(name):
    mixer, texts = make_mixer(name), Texts(1, 30)

    def read(tokens, state):
        q, k, v, hidden = (y[0, tokens] for y in (texts.plain_q, texts.plain_k, texts.v, texts.hidden))
        upright = torch.ones(1, tokens.shape[1], 4, dtype=q.dtype), torch.zeros(1, tokens.shape[1], 4, dtype=q.dtype)
        return call(mixer, (q, k, v, *upright, hidden), state)

    check_rollback(read, start(mixer, 4), 30)
