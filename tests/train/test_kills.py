"""Whenever a run is killed, the next start goes on from the last whole checkpoint as if nothing had happened."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(3, 0), pytest.param(25, None, marks=pytest.mark.slow)],
    ids=["three kills", "many kills"],
)
def test_kills_at_random_moments_change_nothing(tmp_path: Path, make_text, kills, seed) -> None:
    """SIGKILL, SIGTERM and Ctrl-C: the same rows in metrics.csv and the same weights as without them, bit for bit."""
    (tmp_path / "text.txt").write_text(make_text(2000), encoding="utf-8")
    seed = secrets.randbits(32) if seed is None else seed
    command = [sys.executable, str(Path(__file__).with_name("nursery.py")), str(tmp_path), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    print(f"seed {seed}: {done.stdout}")
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    ends = json.loads(done.stdout)["ends"]
    assert len(ends) == kills
    assert any(end["code"] == -9 for end in ends)
    if kills > 10:
        assert len({tuple(end["left"]) for end in ends}) > 5  # they came at different times, after checkpoints too
