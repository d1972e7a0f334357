"""What holds for every synthetic task."""

import pytest
import torch

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic import TASKS

# A length that is one of the task's own, where not every length is.
LENGTHS = {"set_disjointness": 43}


def examples(name: str, seed: int = 0, count: int = 40):
    return TASKS[name]().examples(count, LENGTHS.get(name, 64), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_the_seed_decides_alone(self, name):
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        first, second, other = examples(name), examples(name), examples(name, seed=1)
        assert torch.equal(torch.rand(1), expected)
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.targets, second.targets)
        assert not torch.equal(first.tokens, other.tokens)

    def test_a_generator_goes_on(self, name):
        generator = torch.Generator().manual_seed(0)
        task, length = TASKS[name](), LENGTHS.get(name, 64)
        first, second = task.examples(40, length, generator), task.examples(40, length, generator)
        assert not torch.equal(first.tokens, second.tokens)

    def test_tokens_and_targets_are_of_the_vocabulary(self, name):
        task, drawn = TASKS[name](), examples(name, count=200)
        assert drawn.tokens.dtype == drawn.targets.dtype == torch.int64
        assert drawn.tokens.shape == drawn.targets.shape
        counted = drawn.targets[drawn.targets != IGNORE]
        for values in (drawn.tokens, counted):
            assert values.min() >= 0
            assert values.max() < task.vocab_size
        assert (drawn.targets != IGNORE).any(dim=1).all()

    def test_chance_is_what_a_blind_guess_scores(self, name):
        """Answers that were shuffled score about `chance`: no less than half of it, no more than thrice."""
        task, drawn = TASKS[name](), examples(name, count=2000)
        answers = drawn.targets[drawn.targets != IGNORE]
        blind = answers[torch.randint(len(answers), drawn.targets.shape, generator=torch.Generator().manual_seed(1))]
        accuracy = task.accuracy(blind, drawn.targets)
        assert task.chance / 2 - 0.002 < accuracy < 3 * task.chance

    def test_the_docstring_says_what_it_is(self, name):
        text = TASKS[name].__doc__
        for word in ("Generated", "oss", "etric:", "Paper", "arXiv", "tokens  "):
            assert word in text, word
        assert TASKS[name].paper.split("arXiv ")[1] in text
