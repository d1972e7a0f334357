"""The same tokens in any grouping give the same gradient: batches, accumulation, processes; and so with shards."""

import copy
import os
import socket
import subprocess
import sys

import lightning as L
import one_of_two_ranks
import pytest
import torch
from compare import assert_close
from one_of_two_ranks import gradients_of_run, optimizer_step


def check(steps, expected) -> None:
    assert len(steps) == len(expected) >= 2
    for step, right in zip(steps, expected, strict=True):
        assert step.keys() == right.keys()
        for name in right:
            assert_close(step[name], right[name], 1e-12)


class BareStep(L.Callback):
    """The gradients of the first batch by a bare loop: the mean loss over its targets, clipped."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 0:
            model = copy.deepcopy(module.model)
            inputs = {name: batch[name] for name in ("input_ids", "labels", "cu_seqlens")}
            model(**inputs, z_loss=module.z_loss).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_gradient_is_that_of_the_mean_over_targets(text_file, tmp_path) -> None:
    bare = BareStep()
    steps = gradients_of_run(tmp_path / "run", text_file, batch_size=4, callbacks=[bare])
    for name, gradient in bare.gradients.items():
        assert_close(steps[0][name], gradient, 1e-12)


def test_batches_and_accumulation(text_file, tmp_path) -> None:
    whole = gradients_of_run(tmp_path / "whole", text_file, batch_size=4)
    halves = gradients_of_run(tmp_path / "halves", text_file, batch_size=2, accumulate_grad_batches=2)
    rows = gradients_of_run(tmp_path / "rows", text_file, batch_size=1, accumulate_grad_batches=4)
    check(halves, whole)
    check(rows, whole)


@pytest.mark.slow
def test_processes_and_shards(text_file, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"TORCHELASTIC_RUN_ID": "ranks", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, one_of_two_ranks.__file__, str(tmp_path), str(text_file)]
    subprocess.run(command, env=os.environ | world, timeout=240, check=True)
    results = torch.load(tmp_path / "results.pt")
    check(results["steps"], gradients_of_run(tmp_path / "whole", text_file, batch_size=4))
    for skip, (parameters, norm) in results["sharded"].items():
        expected, expected_norm = optimizer_step(lambda x: x.clone(), skip)
        if not skip:
            assert_close(norm, expected_norm, 1e-12)
        for parameter, right in zip(parameters, expected, strict=True):
            assert_close(parameter, right, 1e-12)
