"""One sequence over two or four processes gives what one process gives: outputs, states, losses and gradients.

`sequence_cases.py` is what the processes run, once for each number of them; the tests look at what they wrote.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sequence_cases

CASES = Path(sequence_cases.__file__)
SIZES = [pytest.param(2, id="2"), pytest.param(4, id="4", marks=pytest.mark.slow)]
QUICK = {2: True, 4: False}

pytestmark = pytest.mark.xdist_group("sequence")  # one worker, so that the ranks run once


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of so many ranks found."""
    done: dict[int, list[dict]] = {}

    def run(size: int) -> list[dict]:
        if size not in done:
            folder = tmp_path_factory.mktemp("ranks")
            plan = "quick" if QUICK[size] else "all"
            command = [sys.executable, "-W", "error", str(CASES), str(folder), str(size), plan]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            ranks = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
            )
            assert ranks.returncode == 0, ranks.stdout
            done[size] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        return done[size]

    return run


def subjects() -> list:
    """Every number of ranks and form, with every op, mixer and model that they are tried on."""
    found = []
    for size in SIZES:
        for form in sequence_cases.FORMS:
            names = [name.split("/")[1] for name, _ in sequence_cases.numeric_cases(form, QUICK[size.values[0]])]
            found += [pytest.param(*size.values, form, name, marks=size.marks) for name in dict.fromkeys(names)]
    return found


def too_far(found: dict[str, dict | str]) -> list[str]:
    """What differs from one process by more than its dtype allows."""
    bounds = {str(dtype).removeprefix("torch."): bound for dtype, bound in sequence_cases.TOLERANCES.items()}
    faults = []
    for name, errors in found.items():
        if isinstance(errors, str):
            faults.append(f"{name}: {errors}")
            continue
        bound = bounds[name.split("/")[0]]
        faults += [
            f"{name}: {what} is {error:.3g} off, > {bound:g}" for what, error in errors.items() if not error <= bound
        ]
    return faults


@pytest.mark.parametrize(("size", "form", "subject"), subjects())
def test_ranks_equal_one_process(ranks, size, form, subject):
    names = [name for name, _ in sequence_cases.numeric_cases(form, QUICK[size]) if name.split("/")[1] == subject]
    for found in ranks(size):
        faults = too_far({name: found[f"{form}/{name}"] for name in names})
        assert not faults, "\n".join(faults)


@pytest.mark.parametrize("size", SIZES)
def test_a_dimension_of_a_mesh(ranks, size):
    for found in ranks(size):
        assert max(found["mesh"].values()) <= 1e-12, found["mesh"]


@pytest.mark.parametrize("form", sequence_cases.FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_as_predicted(ranks, size, form):
    for found in ranks(size):
        for kind, (measured, predicted) in found[f"{form}/volumes"].items():
            assert measured == predicted > 0, kind


@pytest.mark.parametrize("size", SIZES)
def test_a_segment_is_computed_while_states_travel(ranks, size):
    for found in ranks(size):
        assert found["order"] == {way: ["sent", "computed", "waited"] for way in ("forward", "backward")}


@pytest.mark.parametrize("form", sequence_cases.FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_says_what_is_wrong(ranks, size, form):
    expected = {
        "lengths": "T must be the same on all ranks",
        "divide": "T = 21 tokens do not divide by the",
        "form": "form must be one of 'all_gather', 'ring', got 'ulysses'",
        "group": "group must be a DeviceMesh or a ProcessGroup, got str",
        "mesh": "group must be one dimension of the mesh",
        "step": "linear_attention_step takes one token, which ranks cannot share",
        "cache": "ranks cannot share a padded batch with a cache",
        "linearized": "ranks cannot share the text of a linearized model",
        "reverse": "reverse=True is not shared over ranks",
        "bounds": f"cu_seqlens must end at T = {size}, got 1",
    }
    for found in ranks(size):
        for what, message in expected.items():
            assert message in found[f"{form}/refusals"][what]
