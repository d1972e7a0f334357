"""Parity, recall, copying and groups: each text is answered once more by a slow reader in plain Python."""

import itertools
import re

import pytest
import torch

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic import MQAR, Examples, Induction, Parity, SelectiveCopy, WordProblem
from lm_zoo.eval.synthetic.groups import GROUPS, elements, multiplication
from lm_zoo.eval.synthetic.mqar import distinct


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(drawn: Examples):
    """Each text as lists: its tokens, and its targets by position."""
    for tokens, targets in zip(drawn.tokens.tolist(), drawn.targets.tolist(), strict=True):
        yield tokens, {t: target for t, target in enumerate(targets) if target != IGNORE}


def test_parity_counts_ones():
    for tokens, targets in rows(Parity().examples(50, 33, generator())):
        assert targets == {t: sum(tokens[: t + 1]) % 2 for t in range(33)}


class TestMQAR:
    task = MQAR(vocabulary=64, pairs=8)

    def test_every_key_is_asked_once_and_has_the_value_of_its_pair(self):
        for tokens, targets in rows(self.task.examples(200, 64, generator())):
            keys, values = tokens[0:16:2], tokens[1:16:2]
            assert len(set(keys)) == len(set(values)) == 8
            assert all(1 <= key < 32 for key in keys)
            assert all(32 <= value < 64 for value in values)
            pairs = dict(zip(keys, values, strict=True))
            assert all(t >= 16 and t % 2 == 0 for t in targets)
            assert sorted(tokens[t] for t in targets) == sorted(keys)
            assert all(targets[t] == pairs[tokens[t]] for t in targets)

    def test_all_slots_can_be_taken(self):
        for _, targets in rows(self.task.examples(20, 32, generator())):
            assert sorted(targets) == list(range(16, 32, 2))

    def test_the_rest_is_random(self):
        drawn = self.task.examples(2000, 64, generator())
        rest = drawn.tokens[:, 16:][drawn.targets[:, 16:] == IGNORE]
        shares = torch.bincount(rest, minlength=64) / len(rest)
        assert (shares - 1 / 64).abs().max() < 0.004

    def test_slots_follow_the_power_law(self):
        """With one pair a draw without repetition is a plain draw, whose shares are g^-0.99 over their sum."""
        drawn = MQAR(vocabulary=16, pairs=1).examples(40_000, 42, generator())
        slot = (drawn.targets != IGNORE).int().argmax(dim=1).sub(2).div(2, rounding_mode="floor")
        expected = torch.arange(1, 21, dtype=torch.float64) ** -0.99
        shares = torch.bincount(slot, minlength=20) / len(slot)
        torch.testing.assert_close(shares.double(), expected / expected.sum(), rtol=0, atol=0.006)

    def test_more_examples_than_one_draw_holds(self):
        drawn = MQAR(vocabulary=8, pairs=1).examples(2500, 8, generator())
        assert drawn.tokens.shape == (2500, 8)
        assert len(torch.unique(drawn.tokens, dim=0)) > 2000

    @pytest.mark.parametrize(
        ("sizes", "length", "message"),
        [
            ({"pairs": 8}, 31, "length must be at least 4 * pairs = 32, got 31"),
            ({"pairs": 0}, 8, "pairs must be at least 1"),
            ({"vocabulary": 16, "pairs": 8}, 64, "vocabulary must be even and have more than 2 * pairs = 16"),
            ({"vocabulary": 33, "pairs": 4}, 64, "vocabulary must be even"),
        ],
    )
    def test_refuses(self, sizes, length, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            MQAR(**sizes).examples(1, length, generator())


def test_distinct_is_uniform_over_ordered_choices():
    drawn = distinct(24_000, 4, 2, generator())
    shares = torch.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16).reshape(4, 4) / len(drawn)
    expected = (1 - torch.eye(4)) / 12
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)


def test_induction_asks_what_followed_the_special_token():
    task = Induction(letters=5)
    first_places = set()
    for tokens, targets in rows(task.examples(300, 12, generator())):
        places = [t for t, token in enumerate(tokens) if token == 5]
        assert len(places) == 2
        assert places[1] == 11
        assert targets == {11: tokens[places[0] + 1]}
        first_places.add(places[0])
    assert first_places == set(range(10))
    with pytest.raises(ValueError, match="length must be at least 3"):
        task.examples(1, 2, generator())


def test_selective_copying_asks_for_the_letters_in_order():
    task, at = SelectiveCopy(letters=5, data=3), set()
    for tokens, targets in rows(task.examples(300, 12, generator())):
        letters = [token for token in tokens if token < 5]
        assert len(letters) == 3
        assert tokens[9:] == [6, 6, 6]
        assert targets == dict(zip((9, 10, 11), letters, strict=True))
        at |= {t for t, token in enumerate(tokens) if token < 5}
    assert at == set(range(9))
    with pytest.raises(ValueError, match=r"length must be at least 2 \* data = 6"):
        task.examples(1, 5, generator())


class TestWordProblem:
    @pytest.mark.parametrize(("group", "order"), [("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60), ("S5", 120)])
    def test_the_table_is_that_of_a_group(self, group, order):
        table = multiplication(group)
        everything = torch.arange(order)
        assert table.shape == (order, order)
        assert torch.equal(table[0], everything)
        assert torch.equal(table[:, 0], everything)
        assert all(torch.equal(line.sort().values, everything) for line in (*table, *table.T))
        assert torch.equal(table[table], table[everything[:, None, None], table])  # (a b) c = a (b c)

    def test_alternating_groups_hold_the_even_permutations(self):
        """Those that an even number of exchanges makes, which is what the determinant of their matrix says."""
        determinants = {p: round(torch.linalg.det(torch.eye(5)[list(p)]).item()) for p in elements("S5")}
        assert elements("A5") == [p for p, sign in determinants.items() if sign == 1]

    @pytest.mark.parametrize("group", GROUPS)
    def test_targets_are_what_the_permutations_do_to_objects(self, group):
        known = elements(group)
        for tokens, targets in rows(WordProblem(group=group).examples(20, 15, generator())):
            objects = range(len(known[0]))
            for t, element in enumerate(known[token] for token in tokens):
                objects = [element[i] for i in objects]
                assert known[targets[t]] == tuple(objects)

    def test_not_every_product_commutes(self):
        table = multiplication("S3")
        assert any(table[a, b] != table[b, a] for a, b in itertools.product(range(6), repeat=2))

    def test_refuses_an_unknown_group(self):
        with pytest.raises(ValueError, match="group must be one of S3, S4, A4, S5, A5, got 'S6'"):
            WordProblem(group="S6")


class TestMetrics:
    guesses = torch.tensor([[1, 2, 3, 4], [1, 0, 0, 4]])
    targets = torch.tensor([[IGNORE, 2, 0, IGNORE], [1, IGNORE, 0, 4]])

    def test_all_targets(self):
        assert MQAR().accuracy(self.guesses, self.targets) == pytest.approx(4 / 5)

    def test_the_last_target_of_a_row_wherever_it_is(self):
        assert Parity().accuracy(self.guesses, self.targets) == pytest.approx(1 / 2)

    def test_rows_without_a_mistake(self):
        class Rows(Parity):
            metric = "rows"

        assert Rows().accuracy(self.guesses, self.targets) == pytest.approx(1 / 2)
        assert Rows().accuracy(self.targets, self.targets) == 1
