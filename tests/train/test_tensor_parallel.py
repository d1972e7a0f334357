"""Models whose heads, MLPs and vocabulary processes share, against one process; and what cannot be shared."""

import json
import os
import socket
import subprocess
import sys

import pytest
import ranks_of_a_cut

from lm_zoo import ZooConfig
from lm_zoo.cli import main
from lm_zoo.errors import UserError
from lm_zoo.layers import MIXERS
from lm_zoo.train.tensor_parallel import check_cuts, describe_cuts

SIZES = {"vocab_size": 16, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 24}


def test_every_mixer_is_looked_at() -> None:
    assert {options.get("type", name) for name, options in ranks_of_a_cut.MIXERS.items()} == set(MIXERS)


HELD = {"2 rows 2": 0.62, "4 rows 2": 0.31, "4 sequence 2": 0.31, "4 rows 4": 0.43}  # of the numbers, at most


@pytest.mark.parametrize("case", ["2 rows 2", *(pytest.param(case, marks=pytest.mark.slow) for case in list(HELD)[1:])])
def test_shared_mixers_equal_whole_ones(case, tmp_path) -> None:
    """Of each kind a block: parameters as drawn, loss, gradients, logits with a cache, statistics of the layers.

    A case is a number of processes, what those share that do not share matrices, and how many share these.
    """
    processes, *shared = case.split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": processes}
    world |= {"LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ranks_of_a_cut.__file__, str(tmp_path / "found.json"), *shared]
    subprocess.run(command, env=os.environ | world, timeout=240, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    gradients = found.pop("gradients")
    assert len(gradients) > 10 * len(ranks_of_a_cut.MIXERS)
    assert max(gradients.items(), key=lambda item: item[1])[1] < 1e-12, gradients
    assert found.pop("parameters") == 0
    assert found.pop("held") < HELD[case]
    assert max(map(abs, found.values())) < 1e-12, found


def config(**mixers) -> ZooConfig:
    return ZooConfig(mixers=mixers, **SIZES)


def test_what_is_shared_is_told() -> None:
    plain = config(gla={"num_heads": 4}, local={"type": "attention", "num_heads": 4})
    assert describe_cuts(plain, 2) == "parallel.tensor=2 cuts the vocabulary, the MLPs, gla, local"
    mixers = {"s4d": {}, "mamba2": {"head_size": 8}, "retnet": {"num_heads": 4}}
    some = ZooConfig(mixers=mixers, **SIZES | {"intermediate_size": 0})
    line = "parallel.tensor=4 cuts the vocabulary, retnet; every process computes all of s4d, mamba2"
    assert describe_cuts(some, 4) == line


UNEVEN = {
    "num_heads=3 of mixers['gla']": config(gla={"num_heads": 3}),
    "num_kv_heads=1 of mixers['local']": config(local={"type": "attention", "num_heads": 8, "num_kv_heads": 1}),
    "num_groups=3 of mixers['mamba2']": config(mamba2={"head_size": 8, "num_groups": 3}),
    "size=50 of f_proj.weight of mixers['hgrn']": ZooConfig(mixers={"hgrn": {}}, **SIZES | {"hidden_size": 50}),
    "intermediate_size=26": ZooConfig(mixers={"s4d": {}}, **SIZES | {"intermediate_size": 26}),
}


@pytest.mark.parametrize("message", UNEVEN)
def test_what_does_not_divide_is_refused(message) -> None:
    with pytest.raises(UserError) as error:
        check_cuts(UNEVEN[message], 4)
    assert str(error.value) == f"parallel.tensor=4 does not divide {message}; give a divisor, or another model"


BAD = {
    "none": (["--parallel.tensor", "0"], "parallel.tensor=0 is not possible"),
    "processes": (["--parallel.tensor", "3"], "parallel.tensor=3 does not divide the 2 processes of a machine"),
    "grid": (
        ["--parallel.tensor", "2", "--parallel.sequence", "2"],
        "parallel.sequence=2 does not divide the 2 processes of the run over parallel.tensor=2",
    ),
    "heads": (
        ["--parallel.tensor", "2", "--model.config", "{mixers: {gla: {num_heads: 1}}}"],
        "parallel.tensor=2 does not divide num_heads=1 of mixers['gla']",
    ),
    "vocabulary": (
        ["--parallel.tensor", "2", "--model.config", "{vocab_size: 333}"],
        "parallel.tensor=2 does not divide vocab_size=333",
    ),
    "compile": (["--parallel.tensor", "2", "--model.compile", "eager"], "model.compile and parallel.tensor do not go"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_training(case, capfd, text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    given = ["--config", "gla-tiny", "--data.files", str(text_file), "--trainer.devices", "2", "--out", "run"]
    given += ["--data.cache_dir", "cache", "--trainer.accelerator", "cpu"]
    assert main(["train", *given, *options]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("lm-zoo: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()
