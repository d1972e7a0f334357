"""The optimizer against torch's own AdamW and Muon, and which parameters Muon takes."""

import pytest
import torch
from compare import assert_close
from interrupted_runs import Crash, CrashAt, curve
from torch import nn

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.train import Checkpoints
from lm_zoo.train.optim import parameter_groups
from lm_zoo.train.optimizer import AdamWMuon, orthogonalised


def steps(make, shapes, count=3):
    """The parameters after a few steps of the optimizer that `make` makes of them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = make(parameters)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_adamw_is_torchs() -> None:
    shapes, options = [(5, 3), (7,)], {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = steps(lambda p: AdamWMuon([{"params": p}], **options), shapes)
    for a, b in zip(ours, steps(lambda p: torch.optim.AdamW(p, fused=True, **options), shapes), strict=True):
        assert torch.equal(a, b)


def test_muon_is_torchs() -> None:
    """Which iterates in bfloat16, hence the tolerance."""
    shapes, options = [(6, 10), (10, 6), (6, 10), (8, 8)], {"lr": 0.01, "weight_decay": 0.1}
    start = steps(lambda p: AdamWMuon([{"params": p}], lr=0.0), shapes, count=0)
    ours = steps(lambda p: AdamWMuon([{"params": p, "muon": True}], **options), shapes)
    theirs = steps(lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", **options), shapes)
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert_close(a - before, b - before, 2e-2)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_singular_values_are_brought_near_one(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(shape, generator=generator) * scale for scale in (1e-3, 1.0, 1e3)]
    for update, result in zip(updates, orthogonalised(updates), strict=True):
        assert result.shape == update.shape
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5
        assert values.max() < 1.3
        assert_close(result, orthogonalised([update])[0], 1e-5)  # whatever stands beside it


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = ZooForCausalLM(ZooConfig.preset("hybrid-tiny"))
    groups = parameter_groups(model, 0.1, muon=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    matrices = {names[id(parameter)] for parameter in groups[2]["params"]}
    assert matrices == {name for name in names.values() if ".layers." in name and name.endswith("proj.weight")} | {
        name for name in names.values() if "decay_proj." in name and name.endswith("weight")
    }
    assert not any("embed" in name or "lm_head" in name for name in matrices)
    for preset in ZooConfig.presets():
        if preset.endswith("tiny"):
            AdamWMuon(parameter_groups(ZooForCausalLM(ZooConfig.preset(preset)), 0.1, muon=True), lr=1e-3)


def test_muon_wants_matrices() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter of shape \[3\]"):
        AdamWMuon([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}], lr=0.1)


def test_a_run_with_muon_learns_and_resumes_exactly(start_run, tmp_path) -> None:
    options = {"max_steps": 30, "log_every_n_steps": 10, "model": {"optimizer": "muon", "learning_rate": 0.02}}
    _, whole = start_run("whole", **options)
    with pytest.raises(Crash):
        start_run("parts", checkpoints=Checkpoints(every_n_steps=10), callbacks=[CrashAt(17)], **options)
    _, resumed = start_run("parts", resume="last", **options)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    losses = [float(line["train_loss"]) for line in curve(tmp_path / "whole")]
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
