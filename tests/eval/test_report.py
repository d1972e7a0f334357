"""Results on disk: all or nothing."""

import json
import os

import pytest

from lm_zoo.eval.report import check_writable, write_atomically, write_json


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "result.json"
    for number in (1, 2):
        write_json(path, {"number": number})
        assert json.loads(path.read_text()) == {"number": number}
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.bin"
    write_atomically(path, b"earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_numbers_that_json_has_not(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_refuses_impossible_outputs_beforehand(tmp_path):
    check_writable(tmp_path / "fine.json")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_writable(tmp_path / "none" / "out.json")
