"""Weight decay goes to matrices only, and the learning rate follows the schedule of the whole run."""

import itertools
import math

import pytest
import torch
from torch import nn

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.errors import UserError
from lm_zoo.modules.feature_maps import T2R
from lm_zoo.train.metrics import read_metrics
from lm_zoo.train.optim import Schedule, parameter_groups


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(2, 4))
        self.dt_bias = nn.Parameter(torch.zeros(2, 4))
        self.marked = nn.Parameter(torch.zeros(2, 4))
        self.marked._no_weight_decay = True
        self.map = T2R(2, 4)
        self.frozen = nn.Parameter(torch.zeros(2, 4), requires_grad=False)
        self.low_rank = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4))
        self.norm = nn.LayerNorm(4)


def test_norms_biases_and_gates_do_not_decay() -> None:
    model = Gates()
    decayed, kept = parameter_groups(model, 0.3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0.0
    assert {names[p] for p in decayed["params"]} == {"low_rank.0.weight", "low_rank.1.weight"}
    assert {names[p] for p in kept["params"]} == {
        "A_log", "dt_bias", "marked", "map.weight", "map.bias", "low_rank.1.bias", "norm.weight", "norm.bias",
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["gla-tiny", "retnet-tiny", "hybrid-tiny"])
def test_every_parameter_of_a_model_is_in_one_group(preset) -> None:
    model = ZooForCausalLM(ZooConfig.preset(preset))
    groups = [parameter for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(groups) == len(set(groups)) == len(list(model.parameters()))  # tied embeddings count once
    kept = set(parameter_groups(model, 0.1)[1]["params"])
    for name, parameter in model.named_parameters():
        assert (parameter in kept) == ("norm" in name or name.endswith("bias")), name


def test_cosine() -> None:
    schedule = Schedule("cosine", warmup=0.1, final=0.2)
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert schedule(10 + 89 // 2, 100) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 44 / 89)) / 2)


def test_linear() -> None:
    rates = [Schedule("linear", warmup=0.1, final=0.1)(step, 101) for step in range(101)]
    assert rates[10:] == pytest.approx([1 - 0.9 * i / 90 for i in range(91)])


def test_wsd_is_flat_and_then_falls() -> None:
    rates = [Schedule("wsd", warmup=0.1, decay=0.25, final=0.0)(step, 100) for step in range(100)]
    assert set(rates[10:76]) == {1.0}
    assert rates[99] == 0.0
    assert all(a > b for a, b in itertools.pairwise(rates[75:]))


def test_constant_and_runs_of_any_length() -> None:
    assert Schedule("constant", warmup=0)(7, 10) == 1.0
    for name in ("cosine", "linear", "wsd", "constant"):
        for total in (1, 2, 3, 7):
            assert all(0 < Schedule(name, warmup=0.5, decay=0.5)(step, total) <= 1 for step in range(total + 3))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(UserError, match="schedule 'sine' is not known; choose cosine, linear, wsd or constant"):
        Schedule("sine")
    with pytest.raises(UserError, match=r"warmup=3 must be a part of the whole"):
        Schedule(warmup=3)
    with pytest.raises(UserError, match=r"warmup=0\.6 and decay=0\.5 exceed the whole run"):
        Schedule("wsd", warmup=0.6, decay=0.5)


def test_a_run_follows_the_schedule(start_run, tmp_path) -> None:
    start_run("run", max_steps=8, accumulate_grad_batches=2, model={"warmup": 0.25, "learning_rate": 0.01})
    rates = [float(line["learning_rate"]) for line in read_metrics(tmp_path / "run" / "metrics.csv")]
    schedule = Schedule("cosine", warmup=0.25, final=0.1)
    assert rates == pytest.approx([0.01 * schedule(step, 8) for step in range(8)])
