"""Whenever a run is killed, the next start goes on from the last whole checkpoint as if nothing had happened."""

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import nursery
import pytest
from interrupted_runs import Crash, curve

from lm_zoo.train.checkpoints import find_checkpoints


@pytest.mark.parametrize(
    ("kills", "seed", "ranks"),
    [
        (3, 0, 1),
        pytest.param(25, None, 1, marks=pytest.mark.slow),
        pytest.param(10, None, 2, marks=pytest.mark.slow),
    ],
    ids=["three kills", "many kills", "of two processes"],
)
def test_kills_at_random_moments_change_nothing(tmp_path: Path, make_text, kills, seed, ranks) -> None:
    """SIGKILL, SIGTERM and Ctrl-C: the same rows in metrics.csv and the same weights as without them, bit for bit."""
    (tmp_path / "text.txt").write_text(make_text(2000), encoding="utf-8")
    seed = secrets.randbits(32) if seed is None else seed
    command = [sys.executable, nursery.__file__, str(tmp_path), str(kills), str(seed), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    print(f"seed {seed}: {done.stdout}")
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    ends = json.loads(done.stdout)["ends"]
    assert len(ends) == kills
    if kills > 3:
        assert any(end["code"] == -9 for end in ends)
        assert len({tuple(end["left"]) for end in ends}) > kills // 5  # at different times, after checkpoints too
    if ranks > 1:
        assert any(2 in end["others"] for end in ends)


class CrashInValidation(L.Callback):
    def on_validation_batch_end(self, *args) -> None:
        raise Crash


def test_a_validation_that_was_cut_short_is_done_first(start_run, tmp_path) -> None:
    options = {"max_steps": 5, "val_check_interval": 2, "data": {"val_fraction": 0.1}, "limit_val_batches": 3}
    start_run("whole", **options)
    for resume in (None, "last"):  # cut short twice, and half a line was written in between
        with pytest.raises(Crash):
            start_run("parts", callbacks=[CrashInValidation()], resume=resume, **options)
        with (tmp_path / "parts" / "metrics.csv").open("a") as file:
            file.write("1,32,5.7")
    start_run("parts", resume="last", **options)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.slow
def test_when_a_process_of_several_dies_the_others_say_so_and_end(tmp_path: Path, make_text) -> None:
    (tmp_path / "text.txt").write_text(make_text(2000), encoding="utf-8")
    command = [sys.executable, "-m", "lm_zoo.cli", "train", *nursery.OPTIONS, "--trainer.devices", "2", "--out", "run"]
    command[command.index("--trainer.max_steps") + 1] = "100000"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}  # what torchrun sets
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for line in processes[0].stderr:
            if line.startswith("step 6 of"):
                processes[1].kill()
                break
        _, said = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    last = said.splitlines()[-1]
    assert last.startswith(
        "lm-zoo: error: process 0 stops, because another of the run's 2 processes has ended; see what"
    )
    assert "Traceback" not in said
    assert processes[0].returncode == 2
    assert find_checkpoints(tmp_path / "run" / "checkpoints")
