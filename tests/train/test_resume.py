"""A run that was stopped and resumed is the uninterrupted run, bit for bit."""

import pytest
import torch
from interrupted_runs import Crash, CrashAt, curve

from lm_zoo.train import Checkpoints


@pytest.mark.parametrize(
    ("accumulate", "crash_at"),
    [(1, 7), (1, 8), (3, 10), (3, 11), (3, 12), (4, 25)],
    ids=lambda value: str(value),
)
def test_a_crash_and_a_resume_change_nothing(start_run, tmp_path, accumulate, crash_at) -> None:
    """Sums for the log, the order within an epoch of five batches, validations: all go on where they were."""
    options = {
        "max_steps": 9, "accumulate_grad_batches": accumulate, "log_every_n_steps": 4,
        "val_check_interval": 2 * accumulate, "limit_val_batches": 3,
    }  # fmt: skip
    data = {"val_fraction": 0.1, "max_tokens": 5 * 32}
    _, whole = start_run("whole", data=data, **options)
    with pytest.raises(Crash):
        start_run(
            "parts", data=data, checkpoints=Checkpoints(every_n_steps=2), callbacks=[CrashAt(crash_at)], **options
        )
    trainer, resumed = start_run("parts", data=data, resume="last", **options)
    assert trainer.global_step == 9
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
