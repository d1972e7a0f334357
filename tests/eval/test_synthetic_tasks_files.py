"""The task files of configs/synthetic: every part of every budget can be drawn."""

import pytest
import torch

from lm_zoo.eval.synthetic.picture import by_test
from lm_zoo.eval.synthetic.plan import read_plan

NAMES = [
    *("modular_arithmetic", "modular_arithmetic_brackets", "set_disjointness", "needle", "multi_needle"),
    *("in_context_recall", "noisy_in_context_recall", "fuzzy_in_context_recall", "memorization", "compression"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", ["cpu", "gpu", "paper"])
def test_every_part_can_be_drawn(name, budget):
    plan = read_plan(name, budget)
    run = plan.run(next(iter(plan.mixers)), plan.budget.hidden_sizes[0], plan.budget.learning_rates[0], 0)
    for part in (*plan.budget.train, *plan.budget.test):
        examples = run.task_of(part).examples(2, part["length"], torch.Generator().manual_seed(0))
        assert examples.tokens.shape == (2, part["length"])
    if plan.against == "length":
        assert len({part["length"] for part in plan.budget.test}) == len(plan.budget.test)
    assert (plan.budget.steps is None) != (plan.budget.epochs is None)
    assert plan.budget.device == ("cpu" if budget == "cpu" else "cuda")


@pytest.mark.parametrize(("against", "places"), [("tests", [0, 1]), ("length", [23, 43])])
def test_tests_stand_side_by_side_or_at_their_lengths(against, places):
    row = {
        "mixer": "gla",
        "hidden_size": 64,
        "seeds": 1,
        "accuracy": [0.5, 0.4],
        "worst": [0.3, 0.2],
        "best": [1.0, 0.9],
    }
    content = {"against": against, "tests": ["a", "b"], "lengths": [23, 43], "rows": [row]}
    content["settings"] = {"hidden_sizes": [64]}
    assert by_test(content) == {"gla": [(places[0], 0.5, 0.3, 1.0), (places[1], 0.4, 0.2, 0.9)]}
