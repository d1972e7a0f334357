"""Tasks of recall, against a look-up in a dict."""

import math

import pytest
import torch

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic import (
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    Memorization,
    MultiNeedle,
    Needle,
    NoisyInContextRecall,
)
from lm_zoo.eval.synthetic.compression import places


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(task, count: int, length: int):
    examples = task.examples(count, length, generator())
    assert examples.tokens.shape == examples.targets.shape == (count, length)
    return zip(examples.tokens.tolist(), examples.targets.tolist(), strict=True)


class TestNeedle:
    @pytest.mark.parametrize(
        ("task", "length"),
        [
            (Needle(), 5),
            (Needle(), 64),
            (Needle(needles=3, questions=2, keys=4, values=2, words=1), 14),
            (Needle(needles=3, questions=2, keys=4, values=2, words=1), 15),
            (MultiNeedle(), 35),
            (MultiNeedle(), 200),
        ],
    )
    def test_the_answer_is_what_a_dict_says(self, task, length):
        fact, ask = task.vocab_size - 2, task.vocab_size - 1
        starts = set()
        for tokens, targets in rows(task, 100, length):
            known = {}
            expected = [IGNORE] * length
            for place, token in enumerate(tokens):
                if token == fact:
                    starts.add(place)
                    known[tokens[place + 1]] = tokens[place + 2]
                if token == ask:
                    expected[place + 1] = known[tokens[place + 1]]
            assert len(known) == task.needles == tokens.count(fact)
            assert tokens.count(ask) == task.questions
            assert all(key < task.keys <= value < task.keys + task.values for key, value in known.items())
            assert targets == expected
            words = [token for token in tokens if task.keys + task.values <= token < fact]
            assert len(words) == length - 3 * task.needles - 3 * task.questions + 1
        assert len(starts) > 2 or length == 5 or length == 14

    def test_any_place_is_as_likely(self):
        examples = Needle().examples(4000, 22, generator())
        starts = (examples.tokens == 256).nonzero()[:, 1].bincount(minlength=18) / 4000
        assert len(starts) == 18  # the question takes the last two of 22 tokens, the needle three
        assert (starts - 1 / 18).abs().max() < 0.02

    @pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 48), (1.0, 97)])
    def test_depth_is_where_it_stands(self, depth, place):
        examples = Needle(depth=depth).examples(5, 102, generator())
        assert (examples.tokens == 256).nonzero()[:, 1].tolist() == [place] * 5


class TestInContextRecall:
    @pytest.mark.parametrize(
        ("task", "length"),
        [
            (InContextRecall(), 4),
            (InContextRecall(), 128),
            (InContextRecall(vocabulary=5), 20),
            (NoisyInContextRecall(), 4),
            (NoisyInContextRecall(), 128),
            (InContextRecall(vocabulary=12, noise_vocabulary=8, noise=0.9), 30),
        ],
    )
    def test_the_answer_is_what_a_dict_says(self, task, length):
        noisy = 0
        for tokens, targets in rows(task, 60, length):
            known = {}
            expected = []
            for key, value in zip(tokens[::2], tokens[1::2], strict=True):
                is_noise = min(key, value) >= task.num_keys + task.num_values
                assert is_noise or key < task.num_keys <= value < task.num_keys + task.num_values
                noisy += is_noise
                expected += [known.get(key, IGNORE), IGNORE]
                if not is_noise:
                    assert known.setdefault(key, value) == value
            assert targets == expected
            assert targets[-2] != IGNORE
        candidates = 60 * (length // 2 - 2)  # neither the last pair nor one more
        assert abs(noisy - task.noise * candidates) <= 0.05 * candidates

    def test_the_last_key_is_any_that_has_come(self):
        examples = InContextRecall().examples(3000, 128, generator())
        last = examples.tokens[:, -2].bincount(minlength=8) / 3000
        assert (last - 1 / 8).abs().max() < 0.02

    def test_the_last_key_is_drawn_among_kinds_and_not_among_pairs(self):
        tokens = InContextRecall(vocabulary=4).examples(2000, 8, generator()).tokens
        zeros = (tokens[:, 0:6:2] == 0).sum(dim=1)
        last_is_rarer = (tokens[:, 6] == 0)[zeros == 1]
        assert abs(last_is_rarer.float().mean() - 1 / 2) < 0.05

    def test_sizes_are_those_of_mad(self):
        for task in (InContextRecall(), NoisyInContextRecall()):
            assert (task.num_keys, task.num_values, task.chance) == (8, 8, 1 / 8)
        assert NoisyInContextRecall().vocab_size == 32


class TestFuzzyInContextRecall:
    @pytest.mark.parametrize(
        ("task", "length"),
        [
            (FuzzyInContextRecall(), 12),
            (FuzzyInContextRecall(), 128),
            (FuzzyInContextRecall(shortest_key=3), 128),
            (FuzzyInContextRecall(vocabulary=3, longest_key=1, longest_value=1), 9),
        ],
    )
    def test_the_answer_is_what_a_dict_says(self, task, length):
        key_sizes, value_sizes = set(), set()
        for tokens, targets in rows(task, 40, length):
            text = [token for token in tokens if token < task.vocabulary - 1]
            assert tokens == [task.vocabulary - 1] * (length - len(text)) + text
            assert length - len(text) < 2 * (task.longest_key + task.longest_value)
            known = {}
            expected = [IGNORE] * (length - len(text))
            for key, value in pairs(text, task.num_keys):
                assert len(set(key)) == len(key)
                assert len(set(value)) == len(value)
                key_sizes.add(len(key))
                value_sizes.add(len(value))
                answer = known.get(key, (IGNORE,) * len(value))
                expected += [IGNORE] * (len(key) - 1) + [*answer, IGNORE]
                assert known.setdefault(key, value) == value
            assert targets == expected
            assert targets[-2] != IGNORE
        assert key_sizes == set(range(task.shortest_key, task.longest_key + 1))
        assert value_sizes == set(range(1, task.longest_value + 1))

    def test_sizes_are_those_of_mad(self):
        task = FuzzyInContextRecall()
        assert (task.num_keys, task.num_values, task.vocab_size) == (7, 8, 16)


def pairs(text: list[int], num_keys: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Keys and values: runs of tokens below and from `num_keys`."""
    runs: list[list[int]] = []
    for before, token in zip([num_keys, *text], text, strict=False):
        if (token < num_keys) != (before < num_keys):
            runs.append([])
        runs[-1].append(token)
    return [(tuple(key), tuple(value)) for key, value in zip(runs[::2], runs[1::2], strict=True)]


class TestMemorization:
    @pytest.mark.parametrize(("vocabulary", "length"), [(256, 32), (3, 2), (4, 10)])
    def test_one_dict_fits_all_texts(self, vocabulary, length):
        task = Memorization(vocabulary=vocabulary)
        known = {}
        for seed in range(20):
            examples = task.examples(50, length, generator(seed))
            assert (examples.tokens[:, 1::2] == vocabulary - 1).all()
            assert (examples.targets[:, ::2] == IGNORE).all()
            keys, values = examples.tokens[:, ::2].flatten().tolist(), examples.targets[:, 1::2].flatten().tolist()
            for key, value in zip(keys, values, strict=True):
                assert known.setdefault(key, value) == value
        assert sorted(known) == list(range((vocabulary - 1) // 2))
        assert len(set(known.values())) == len(known)
        assert all(len(known) <= value < vocabulary - 1 for value in known.values())

    def test_another_seed_is_another_dict(self):
        assert not torch.equal(Memorization().values, Memorization(seed=1).values)


class TestCompression:
    @pytest.mark.parametrize(("vocabulary", "length"), [(16, 32), (2, 2), (5, 7)])
    def test_everything_is_asked_for(self, vocabulary, length):
        examples = Compression(vocabulary=vocabulary).examples(50, length, generator())
        assert torch.equal(examples.tokens, examples.targets)
        assert (examples.tokens[:, -1] == vocabulary - 1).all()
        assert examples.tokens[:, :-1].unique().tolist() == list(range(vocabulary - 1))

    def test_the_decoder_sees_the_last_vector_alone(self):
        torch.manual_seed(0)
        decoder, hidden = Compression().decoder(8), torch.randn(2, 5, 8)
        before = decoder(hidden)
        hidden[:, :-1] = torch.randn(2, 4, 8)
        assert torch.equal(decoder(hidden), before)
        hidden[:, -1] += 1
        assert not torch.allclose(decoder(hidden), before)
        assert before.shape == hidden.shape
        assert len({tuple(row) for row in before[0].tolist()}) == 5  # every place has an answer of its own

    def test_places_are_sines_and_cosines(self):
        expected = [[math.sin(t), math.sin(t / 10_000), math.cos(t), math.cos(t / 10_000)] for t in range(3)]
        torch.testing.assert_close(places(3, 4), torch.tensor(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compression(vocabulary=1), "vocabulary must be at least 2"),
        (lambda: Compression().examples(1, 1, generator()), "length must be at least 2"),
        (lambda: Compression().decoder(7), "hidden_size must be even"),
        (lambda: Needle(needles=9, keys=8), "needles = 9 need as many keys, got keys = 8"),
        (lambda: Needle(questions=2), "questions = 2 ask for more than needles = 1"),
        (lambda: Needle(values=0), "values must be at least 1, got 0"),
        (lambda: Needle(depth=1.1), r"depth must be in \[0, 1\], got 1.1"),
        (lambda: MultiNeedle(depth=0.5), "depth is that of a single needle, got needles = 8"),
        (lambda: Needle().examples(1, 4, generator()), "length must be at least 5"),
        (lambda: MultiNeedle().examples(1, 34, generator()), "length must be at least 35"),
        (lambda: InContextRecall(vocabulary=3), "noise_vocabulary must leave 2 keys and 2 values of vocabulary = 3"),
        (lambda: InContextRecall(noise_vocabulary=13), "noise_vocabulary must leave 2 keys"),
        (lambda: InContextRecall(noise=0.1), "noise = 0.1 needs tokens: give noise_vocabulary"),
        (lambda: NoisyInContextRecall(noise=1.0), r"noise must be in \[0, 1\), got 1.0"),
        (lambda: InContextRecall().examples(1, 2, generator()), "length must be even and at least 4"),
        (lambda: InContextRecall().examples(1, 7, generator()), "length must be even and at least 4"),
        (lambda: FuzzyInContextRecall(longest_key=8), "longest_key = 8 needs as many different tokens"),
        (lambda: FuzzyInContextRecall(longest_value=9), "longest_value = 9 needs as many different tokens"),
        (lambda: FuzzyInContextRecall(shortest_key=4), "shortest_key = 4 is above longest_key = 3"),
        (lambda: FuzzyInContextRecall().examples(1, 11, generator()), "length must be at least 12"),
        (lambda: Memorization(vocabulary=2), "vocabulary must be at least 3"),
        (lambda: Memorization().examples(1, 31, generator()), "length must be even and at least 2"),
    ],
)
def test_refuses_sizes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
