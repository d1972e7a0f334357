"""Checkpoints are whole, stand at step borders, and one is left by Ctrl-C."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from lm_zoo.errors import UserError
from lm_zoo.train import Checkpoints, Interrupted
from lm_zoo.train.checkpoints import find_checkpoints, read_checkpoint
from lm_zoo.train.run import export
from lm_zoo.train.shards import failure_of
from lm_zoo.train.snapshot import check_seal, save_snapshot


class Press(L.Callback):
    """Presses Ctrl-C (or sends another signal) when the hook is called the n-th time."""

    def __init__(self, hook: str, count: int = 1, *signals: int) -> None:
        self.left, self.signals = count, signals or (signal.SIGINT,)
        setattr(self, hook, self.press)

    def press(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            for signum in self.signals:
                os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_amid_an_accumulation_waits_for_the_step(start_run, tmp_path, signum) -> None:
    options = {"max_steps": 6, "accumulate_grad_batches": 3}
    _, whole = start_run("whole", **options)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as interrupted:
        start_run("parts", callbacks=[Press("on_train_batch_start", 8, signum)], **options)
    assert interrupted.value.signum == signum
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert [path.name for path in find_checkpoints(tmp_path / "parts" / "checkpoints")] == ["step-00000003"]
    _, resumed = start_run("parts", resume="last", **options)
    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_an_interrupt_during_validation_does_not_wait(start_run, tmp_path) -> None:
    options = {"max_steps": 6, "val_check_interval": 2, "data": {"val_fraction": 0.1}}
    _, whole = start_run("whole", **options)
    seen = Press("on_validation_batch_end", 2)
    with pytest.raises(Interrupted, match="step-00000002"):
        start_run("parts", callbacks=[seen], **options)
    assert seen.left == 0
    _, resumed = start_run("parts", resume="last", **options)
    assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)


class PressBeforeTraining(Press):
    """As soon as Lightning has handlers of its own, and before the checkpoints have theirs."""

    def setup(self, trainer, *args, **kwargs) -> None:
        register = trainer._signal_connector.register_signal_handlers

        def registered() -> None:
            register()
            os.kill(os.getpid(), self.signals[0])

        trainer._signal_connector.register_signal_handlers = registered


def test_a_sigterm_before_the_first_step_waits_for_it(start_run, tmp_path) -> None:
    with pytest.raises(Interrupted) as interrupted:
        start_run("run", max_steps=6, callbacks=[PressBeforeTraining("", 1, signal.SIGTERM)])
    assert interrupted.value.signum == signal.SIGTERM
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_a_sigterm_in_the_validation_at_the_end(start_run, tmp_path) -> None:
    options = {"max_steps": 3, "data": {"val_fraction": 0.1}}
    with pytest.raises(SystemExit) as left:
        start_run("run", callbacks=[Press("on_validation_start", 1, signal.SIGTERM)], **options)
    assert left.value.code == 143
    start_run("run", resume="last", **options)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_second_interrupt_quits_at_once(start_run, tmp_path) -> None:
    quit_now = Press("on_train_batch_start", 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start_run("run", callbacks=[quit_now], max_steps=6, checkpoints=Checkpoints(every_n_steps=1))
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000001",
        "step-00000002",
    ]


def test_an_interrupt_in_the_middle_of_a_message(monkeypatch, capfd) -> None:
    """Python refuses a second write to a stream from within one, as a signal handler's would be."""

    class Busy:
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr("sys.stderr", Busy())
    Checkpoints()._on_signal(signal.SIGINT, None)
    assert "stopping after this step" in capfd.readouterr().err


def test_ctrl_c_at_the_terminal(tmp_path: Path, text_file: Path) -> None:
    """The command itself: exit code 130, a plain message, and the same command with --resume finishes the run."""
    command = [
        sys.executable, "-m", "lm_zoo.cli", "train", "--config", "gla-tiny", "--data.files", str(text_file),
        "--data.cache_dir", str(tmp_path / "cache"), "--data.seq_len", "16", "--data.batch_size", "1",
        "--model.config.hidden_size", "16", "--model.config.num_hidden_layers", "1", "--out", str(tmp_path / "run"),
        "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "100000", "--trainer.max_steps",
    ]  # fmt: skip
    with subprocess.Popen([*command, "50000"], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 3 of "):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    (checkpoint,) = find_checkpoints(tmp_path / "run" / "checkpoints")
    steps = read_checkpoint(checkpoint, tensors=False)["global_step"] + 2
    done = subprocess.run(
        [*command, str(steps), "--resume", "last"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"step {steps:,} of {steps:,}" in done.stderr
    assert "Warning" not in done.stderr
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")


class FillDisk(L.Callback):
    """From step `step` on, no file may grow beyond a few bytes: what a full disk looks like from here."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(start_run, tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(every_n_steps=2, keep=1)
    try:
        with pytest.raises(UserError, match=r"cannot save .*step-00000004.*earlier checkpoints are whole") as error:
            start_run("run", max_steps=6, callbacks=[FillDisk(3)], checkpoints=checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    trainer, _ = start_run("run", max_steps=6, resume="last", checkpoints=checkpoints)
    assert trainer.global_step == 6


def test_a_full_disk_at_the_end_leaves_the_run_to_be_finished(start_run, tmp_path, monkeypatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def export_to_a_full_disk(module, folder, weights) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            export(module, folder, weights)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("lm_zoo.train.run.export", export_to_a_full_disk)
    with pytest.raises(UserError, match=r"cannot save .*model: .*; the checkpoints are whole: free some space"):
        start_run("run", max_steps=2)
    assert not any("model" in path.name for path in (tmp_path / "run").iterdir())
    monkeypatch.undo()
    start_run("run", max_steps=2, resume="last")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_what_a_kill_after_the_last_step_left_is_removed(start_run, tmp_path) -> None:
    """Then the resumed run does not train, and only exports."""
    start_run("run", max_steps=2)
    left = [tmp_path / "run" / ".model-abc.tmp", tmp_path / "run" / "checkpoints" / ".step-00000001-7.tmp"]
    for folder in left:
        folder.mkdir()
    start_run("run", max_steps=2, resume="last")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert [folder for folder in left if folder.exists()] == []


def test_what_every_process_says_of_a_full_disk() -> None:
    """The checkpoint of several processes is torch's, whose error is all their tracebacks."""
    failures = {1: (OSError(errno.ENOSPC, "No space left on device"), None), 0: (ValueError("two\nlines"), None)}
    assert failure_of(CheckpointException("", {1: failures[1]})) == "No space left on device"
    assert failure_of(CheckpointException("", failures)) == "two lines"
    assert failure_of(failures[1][0]) == "No space left on device"


def test_damaged_or_foreign_checkpoints_are_refused(start_run, tmp_path, tiny) -> None:
    start_run("run", max_steps=2)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume last"):
        start_run("run", max_steps=4)
    with pytest.raises(UserError, match=r"data.batch_size .*= 2, now it is 3"):
        start_run("run", max_steps=4, resume="last", data={"batch_size": 3})
    with pytest.raises(UserError, match=r"norm_eps=1e-06, this one 1e-05"):
        start_run("run", max_steps=4, resume="last", model={"config": {**tiny, "norm_eps": 1e-5}})
    other = {"config": {**tiny, "mixers": {"attention": {"num_heads": 1}}}}
    # Before a second process is started, which would say it again.
    with pytest.raises(UserError, match=r"has mixers=\{'gla': .*, this one \{'attention': "):
        start_run("run", max_steps=4, resume="last", model=other, devices=2, data={"batch_size": 1})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_snapshot({"weights": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match="foreign is no checkpoint of a training run"):
        start_run("run", max_steps=4, resume=foreign)
    with pytest.raises(UserError, match="holds no checkpoint"):
        start_run("other", max_steps=4, resume="last")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("tensors.safetensors", flip, "tensors.safetensors has not the checksum it was written with"),
        ("tensors.safetensors", halve, r"tensors.safetensors has [\d,]+ bytes, not [\d,]+"),
        ("state.json", flip, "state.json has not the checksum it was written with"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("manifest.json", halve, "its manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "it has no manifest.json"),
    ],
)  # fmt: skip
def test_the_one_before_a_damaged_checkpoint_is_used(two_checkpoints, start_run, capsys, name, damage, what) -> None:
    run, options = two_checkpoints
    newest = find_checkpoints(run / "checkpoints")[-1]
    damage(newest / name)
    with pytest.raises(UserError, match=f"--resume: .*step-00000004 .*{what}; give another checkpoint, or `last`"):
        start_run(run, resume=newest, **options)
    _, resumed = start_run(run, resume="last", **options)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"warning: .*step-00000004 .*{what}; going back to the one before", line)
    _, whole = start_run("whole", **options)
    assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)
    for path in find_checkpoints(run / "checkpoints"):
        check_seal(path)


@pytest.fixture
def two_checkpoints(start_run, tmp_path) -> tuple[Path, dict]:
    options = {"max_steps": 6, "checkpoints": Checkpoints(every_n_steps=2)}
    with pytest.raises(Interrupted):
        start_run("run", callbacks=[Press("on_train_batch_start", 4)], **options)
    return tmp_path / "run", options


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(two_checkpoints, start_run, capsys) -> None:
    run, options = two_checkpoints
    for checkpoint in find_checkpoints(run / "checkpoints"):
        flip(checkpoint / "state.json")
    with pytest.raises(UserError, match=r"step-00000002 is damaged: .*, and there is no other one; start the run anew"):
        start_run(run, resume="last", **options)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_resume_from_an_earlier_checkpoint_replaces_the_later_ones(start_run, tmp_path) -> None:
    options = {"max_steps": 6, "checkpoints": Checkpoints(every_n_steps=2, keep=0)}
    start_run("run", **options)
    first = find_checkpoints(tmp_path / "run" / "checkpoints")[0]
    crash = Press("on_train_batch_start", 3, signal.SIGINT)
    with pytest.raises(Interrupted):
        start_run("run", resume=first, callbacks=[crash], **options)
    names = [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000002", "step-00000004", "step-00000005"]


def test_only_the_newest_are_kept(start_run, tmp_path) -> None:
    start_run("run", max_steps=5, checkpoints=Checkpoints(every_n_steps=1, keep=2))
    names = [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000004", "step-00000005"]
