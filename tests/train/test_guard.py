"""Steps with a gradient that is not finite and spikes of the loss are skipped, counted, and end the run if many."""

import copy

import pytest
import torch
from interrupted_runs import Crash, CrashAt, curve
from lightning.pytorch.callbacks import Callback

from lm_zoo.errors import UserError
from lm_zoo.train import Checkpoints
from lm_zoo.train.gradients import scale_gradients
from lm_zoo.train.guard import MEMORY, StepGuard
from lm_zoo.train.metrics import read_metrics
from lm_zoo.train.optimizer import AdamWMuon


class Poison(Callback):
    """Makes a gradient not finite in the given steps, and keeps the weights before and after."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.changed = steps, {}

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step in self.steps:
            module.model.lm_head.weight.grad[3, 2] = torch.inf

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self._before = copy.deepcopy([module.model.state_dict(), optimizer.state_dict()["state"]])

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        if hasattr(self, "_before") and trainer.global_step - 1 not in self.changed:
            after = [module.model.state_dict(), optimizer.state_dict()["state"]]
            same = all(torch.equal(a, b) for a, b in zip(leaves(after), leaves(self._before), strict=False))
            self.changed[trainer.global_step - 1] = not same


def leaves(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(start_run, tmp_path, optimizer) -> None:
    poison = Poison({2, 5})
    start_run("run", max_steps=7, callbacks=[poison], model={"optimizer": optimizer})
    assert {step for step, changed in poison.changed.items() if not changed} == {2, 5}
    assert len(poison.changed) >= 6
    lines = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [line["skipped_steps"] for line in lines] == list("0011122")
    assert [line["train_loss"] == "" for line in lines] == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_skipped_steps_resumes_exactly(start_run, tmp_path, optimizer) -> None:
    options = {"max_steps": 7, "log_every_n_steps": 3, "model": {"optimizer": optimizer}}
    _, whole = start_run("whole", callbacks=[Poison({1, 4})], **options)
    callbacks = [Poison({1, 4}), CrashAt(5)]
    with pytest.raises(Crash):
        start_run("parts", checkpoints=Checkpoints(every_n_steps=2), callbacks=callbacks, **options)
    _, resumed = start_run("parts", resume="last", callbacks=[Poison({1, 4})], **options)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert curve(tmp_path / "whole")[-1]["skipped_steps"] == "2"
    assert resumed.guard.state_dict() == whole.guard.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_too_many_in_a_row_end_the_run_with_a_report(start_run) -> None:
    model = {"most_skipped": 3}
    start_run("two", max_steps=6, callbacks=[Poison({1, 2, 4, 5})], model=model)
    message = r"3 steps in a row were skipped by step 5\. Of the run's steps, 3 had a loss or a gradient that was not"
    with pytest.raises(UserError, match=message):
        start_run("three", max_steps=6, callbacks=[Poison({1, 2, 3})], model=model, log_every_n_steps=5)


def judge(guard: StepGuard, *losses: float) -> list[float]:
    return [guard.judge(torch.tensor(loss), torch.tensor(1.0)).item() for loss in losses]


def test_spikes() -> None:
    guard = StepGuard(6.0, 10)
    losses = (4 + torch.randn(3 * MEMORY, generator=torch.Generator().manual_seed(0)) / 10).tolist()
    assert not any(judge(StepGuard(6.0, 10), 40.0, *losses[: MEMORY // 2], 40.0))  # too early to tell
    assert not any(judge(guard, *losses))
    assert judge(guard, 4.3, 6.0, 6.0, 4.1, torch.nan, 6.0, 4.0) == [0, 1, 1, 0, 1, 1, 0]
    counts = guard.read(1)
    assert counts["most_in_a_row"] == 2
    assert (counts["not_finite"], counts["spikes"]) == (1, 3)
    assert counts["mean"] == pytest.approx(4, abs=0.1)  # spikes do not enter it
    assert judge(StepGuard(None, 10), *losses, 100.0, torch.nan)[-2:] == [0, 1]


def test_nearly_equal_losses_make_no_spikes() -> None:
    assert not any(judge(StepGuard(6.0, 10), *[1.0] * (2 * MEMORY), 1.1))


@pytest.mark.parametrize(
    ("option", "message"), [("spike_threshold", "must be above 0"), ("most_skipped", "at least 1")]
)
def test_impossible_options_are_refused(start_run, option, message) -> None:
    with pytest.raises(UserError, match=f"model.{option}=0 .*{message}"):
        start_run("run", max_steps=1, model={option: 0})


def test_skipped_steps_are_shown(start_run, capsys) -> None:
    start_run("run", max_steps=3, callbacks=[Poison({1})], enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert ["skipped" in line for line in lines] == [False, True, True]
    assert lines[-1].endswith("1 skipped")
    assert "bits/byte" in lines[0]
    assert "of peak" in lines[0]


def test_nothing_of_a_step_waits_for_the_device() -> None:
    """On the meta device, where there are no values, whatever asks for one raises an error."""
    parameters = [torch.nn.Parameter(torch.zeros(4, 4, device="meta")) for _ in range(2)]
    optimizer = AdamWMuon([{"params": parameters, "muon": True}], lr=0.1)  # AdamW is torch's fused one
    guard = StepGuard(6.0, 10)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        norm = scale_gradients(parameters, weight=torch.ones((), device="meta"), clip_norm=1.0)
        optimizer.skip = guard.judge(torch.zeros((), device="meta"), norm)
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.read(1)
