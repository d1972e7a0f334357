"""Processes that share parameters, sequences, matrices or all of these train, save, resume and export as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_of_a_run
import torch

from lm_zoo import ZooForCausalLM
from lm_zoo.cli import main
from lm_zoo.errors import UserError
from lm_zoo.train import Parallel
from lm_zoo.train.checkpoints import read_checkpoint

STEPS = 50
PARALLEL = {
    "FSDP2": (2, {"shard": "full"}, 2),
    "sequence": (2, {"sequence": 2}, 4),
    "ring": (2, {"sequence": 2, "form": "ring"}, 4),
    "both": (4, {"sequence": 2, "shard": "full"}, 2),
    "both, on two machines": (4, {"sequence": 2, "shard": "hybrid"}, 2),
    "tensor": (2, {"tensor": 2}, 4),
    "tensor, FSDP2": (4, {"tensor": 2, "shard": "full"}, 2),
    "tensor, on two machines": (4, {"tensor": 2, "shard": "hybrid"}, 2),
    "tensor, ring": (4, {"tensor": 2, "sequence": 2, "form": "ring"}, 4),
}  # processes, options, rows per batch so that all have four


@pytest.fixture
def spawn(tmp_path, text_file):
    """Runs `ranks_of_a_run.py` in several processes, on the machines that `nodes` says; returns losses and norms."""

    def run(name: str, processes: int, *, nodes: int = 1, **options) -> list[list[float]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        local, out = processes // nodes, tmp_path / name
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        world |= {"LOCAL_WORLD_SIZE": str(local), "TORCHELASTIC_RUN_ID": name, "OMP_NUM_THREADS": "1"}
        options = json.dumps({"devices": local, "num_nodes": nodes, **options})
        command = [sys.executable, ranks_of_a_run.__file__, str(out), str(text_file), options]
        subprocess.run(command, env=os.environ | world, timeout=300, check=True)
        return json.loads((out / "losses.json").read_text())

    return run


def largest_difference(left: list[list[float]], right: list[list[float]]) -> float:
    return (torch.tensor(left, dtype=torch.float64) - torch.tensor(right, dtype=torch.float64)).abs().max().item()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return ZooForCausalLM.from_pretrained(run / "model", dtype=torch.float64).state_dict()


def same_weights(left: Path, right: Path, tolerance: float) -> None:
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() < tolerance, name


SHARED = {
    "sequence and parameters": ({"sequence": 2, "shard": "full"}, "adamw"),
    "matrices": ({"tensor": 2}, "muon"),
}  # options, optimizer


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_that_share_all_are_one(name, spawn, tmp_path, text_file) -> None:
    """Loss and gradient of every step, what is exported, and a run in one process from their checkpoint."""
    parallel, optimizer = SHARED[name]
    model = {"gradient_checkpointing": True, "optimizer": optimizer}
    options = {"max_steps": 4, "model": model, "data": {"batch_size": 2}}
    options |= {"accumulate_grad_batches": 2, "every_n_steps": 2}
    one = ranks_of_a_run.train(tmp_path / "one", text_file, **options)
    both = spawn("both", 2, parallel=parallel, **options)
    assert len(one) == 4
    assert largest_difference(one, both) < 1e-12
    same_weights(tmp_path / "one", tmp_path / "both", 1e-12)
    checkpoint = tmp_path / "both" / "checkpoints" / "step-00000002"
    assert len(list((checkpoint / "shards").glob("*.distcp"))) == 2
    alone = ranks_of_a_run.train(tmp_path / "alone", text_file, resume=checkpoint, **options)
    assert largest_difference(alone, one[2:]) < 1e-12
    whole = read_checkpoint(tmp_path / "one" / "checkpoints" / "step-00000002")
    assert read_checkpoint(checkpoint)["optimizer_states"][0].keys() == whole["optimizer_states"][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARALLEL)
def test_fifty_steps_are_those_of_one_process(name, spawn, tmp_path, text_file) -> None:
    processes, parallel, batch_size = PARALLEL[name]
    options = {"max_steps": STEPS, "double": False}
    one = ranks_of_a_run.train(tmp_path / "one", text_file, **options)
    nodes = 2 if parallel.get("shard") == "hybrid" else 1
    shared = spawn("shared", processes, nodes=nodes, parallel=parallel, data={"batch_size": batch_size}, **options)
    assert len(one) == STEPS
    difference = largest_difference(*([step[:1] for step in steps] for steps in (one, shared)))
    print(f"{name}: losses differ by {difference:.1e} at most; the last is {one[-1][0]:.6f} and {shared[-1][0]:.6f}")
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [None, {"shard": "full"}, {"sequence": 2, "shard": "full"}], ids=str)
def test_compiled_blocks_on_two_processes(parallel, spawn, tmp_path, text_file) -> None:
    """They are checkpointed, too. A block that shares a sequence is several graphs."""
    options = {"max_steps": 4, "data": {"batch_size": 4 if parallel and "sequence" in parallel else 2}}
    model = {"gradient_checkpointing": True, "compile": "aot_eager"}
    two = spawn("two", 2, parallel=parallel, model=model, **options)
    one = ranks_of_a_run.train(tmp_path / "one", text_file, **options | {"data": {"batch_size": 4}})
    assert largest_difference(one, two) < 1e-12
    same_weights(tmp_path / "one", tmp_path / "two", 1e-12)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(spawn, tmp_path) -> None:
    """Of four rows per batch and nine steps in all, each three in other processes."""
    options = {"max_steps": 9, "every_n_steps": 3}
    full, cut = {"shard": "full"}, {"shard": "full", "tensor": 2}
    one = spawn("one", 1, **options)
    two = spawn("two", 2, parallel=full, data={"batch_size": 2}, **options)
    assert largest_difference(one, two) < 1e-12
    third, sixth = (f"checkpoints/step-0000000{step}" for step in (3, 6))
    resumed = {
        "one to two": (2, {"parallel": full, "data": {"batch_size": 2}, "resume": str(tmp_path / "one" / third)}),
        "two to one": (1, {"resume": str(tmp_path / "two" / third)}),
        "two to four": (4, {"parallel": full, "data": {"batch_size": 1}, "resume": str(tmp_path / "two" / third)}),
        "four to one, sharded": (1, {"parallel": full, "resume": str(tmp_path / "two to four" / sixth)}),
        "one to tensor": (2, {"parallel": {"tensor": 2}, "resume": str(tmp_path / "one" / third)}),
        "two to tensor": (4, {"parallel": cut, "data": {"batch_size": 2}, "resume": str(tmp_path / "two" / third)}),
        "tensor to two": (
            2, {"parallel": full, "data": {"batch_size": 2}, "resume": str(tmp_path / "two to tensor" / sixth)}
        ),
    }  # fmt: skip
    for name, (processes, changed) in resumed.items():
        steps = spawn(name, processes, **options, **changed)
        assert len(steps) == (3 if sixth in changed["resume"] else 6)
        assert largest_difference(steps, one[-len(steps) :]) < 1e-12, name
        same_weights(tmp_path / name, tmp_path / "one", 1e-12)


BAD = {
    "grid": (["--parallel.sequence", "3"], "parallel.sequence=3 does not divide the 2 processes of the run"),
    "length": (["--parallel.sequence", "2", "--data.seq_len", "17"], "data.seq_len=17 does not give"),
    "short": (["--parallel.sequence", "2", "--data.seq_len", "2"], "; 4 would"),
    "none": (["--parallel.sequence", "0"], "parallel.sequence=0 is not possible"),
    "name": (["--parallel.shard", "some"], "parallel.shard: expected one of 'replicate', 'full', 'hybrid', got some"),
    "form": (["--parallel.form", "star"], "parallel.form: expected one of 'all_gather', 'ring', got star"),
    "twice": (["--parallel.shard", "full", "--trainer.strategy", "ddp"], "trainer.strategy=ddp and parallel both say"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, capfd, text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    given = ["--config", "gla-tiny", "--data.files", str(text_file), "--trainer.devices", "2", "--out", "run"]
    assert main(["train", *given, "--trainer.accelerator", "cpu", *options]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("lm-zoo: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == [text_file]


def test_options_from_python_are_checked() -> None:
    with pytest.raises(UserError, match=r"parallel.shard=some is not known; choose replicate, full or hybrid"):
        Parallel(shard="some")
