"""A snapshot gives back what was put in, and anything that happened to it since is noticed."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from lm_zoo.errors import UserError
from lm_zoo.train import snapshot
from lm_zoo.train.snapshot import DTYPES, check_seal, checksum, load_snapshot, save_snapshot, seal

BITS = torch.arange(-6, 6).to(torch.int16)


def tensors() -> dict[str, torch.Tensor]:
    found = {str(dtype): BITS.view(torch.uint8)[: 8 * dtype.itemsize // dtype.itemsize].to(dtype) for dtype in DTYPES}
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    return found | {
        "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "also empty": torch.empty(0), "weight": weight,
        "transposed": weight.T, "part": weight[1:, :2], "nan": torch.tensor([float("nan"), float("-inf")]),
    }  # fmt: skip


def assert_same(left, right) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    else:
        assert left == right or (left != left and right != right)


def test_everything_comes_back(tmp_path) -> None:
    state = {
        "tensors": tensors(), "numbers": [0, -1, 2**70, 0.1, 1e-320, float("inf"), float("nan"), True, None],
        "text": "態🙂\n\"", "betas": (0.9, (0.95, [1])), "state": {0: {"step": torch.tensor(3.0)}, 7: {}},
        "odd": {"$tensor": 1, "a/b": 2, "": 3}, "mixed": {1: "a", "1": "b", None: "c"},
    }  # fmt: skip
    save_snapshot(state, tmp_path)
    check_seal(tmp_path)
    assert_same(load_snapshot(tmp_path), state)
    assert load_snapshot(tmp_path, tensors=False)["tensors"]["weight"] is None
    assert "tensors/weight" in load_file(tmp_path / "tensors.safetensors")  # any reader of the format takes the file


def test_tied_weights_are_written_once_and_stay_tied(tmp_path) -> None:
    weight = torch.randn(1000)
    save_snapshot({"a": weight, "b": weight, "view": weight[:10]}, tmp_path)
    assert (tmp_path / "tensors.safetensors").stat().st_size < 5000
    loaded = load_snapshot(tmp_path)
    assert loaded["a"] is loaded["b"]
    assert_same(loaded["view"], weight[:10])


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(2, dtype=torch.complex64)])
def test_what_cannot_be_held_is_named(tmp_path, value) -> None:
    with pytest.raises(TypeError, match=r"callbacks/Mine/0 is a .*checkpoint"):
        save_snapshot({"callbacks": {"Mine": [value]}}, tmp_path)


def test_a_checksum_depends_on_every_byte_and_not_on_the_parts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", 64)
    content = bytes(range(250)) * 3
    sums = set()
    for cuts in ([0, 750], [0, 64, 128, 750], [0, 1, 1, 100, 700, 750]):
        parts = [content[start:end] for start, end in itertools.pairwise(cuts)]
        sums.add(json.dumps(snapshot.write_summed(tmp_path / "file", parts)))
        assert (tmp_path / "file").read_bytes() == content
        sums.add(json.dumps(checksum(tmp_path / "file")))
    assert len(sums) == 1
    for i in range(750):
        changed = bytearray(content)
        changed[i] ^= 1
        sums.add(json.dumps(snapshot.write_summed(tmp_path / "file", [changed])))
    assert len(sums) == 751


def test_a_folder_of_shards_is_sealed_too(tmp_path) -> None:
    """What `torch.distributed.checkpoint` writes: files that no one summed while they were written."""
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "meta/inner"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 100)
    seal(tmp_path)
    check_seal(tmp_path)
    (tmp_path / "meta/inner").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"is damaged: meta/inner has not the checksum"):
        check_seal(tmp_path)
