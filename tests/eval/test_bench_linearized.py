"""A student decodes what its parallel form says, from a state that does not grow."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from linearize_fixtures import STORIES, byte_teacher, tokenizer
from transformers import AutoModelForCausalLM

from lm_zoo.errors import UserError
from lm_zoo.eval import bench_linearized as bench
from lm_zoo.linearized import LinearizedForCausalLM, hybrid

STUDENTS = {
    "terrace": ("hybrid", {"window": 4}),
    "sliding": ("hybrid", {"window": 4, "window_kind": "sliding"}),
    "no window": ("hybrid", {"window": 0}),
    "liger": ("liger", {"window": 4}),
}
KEYS_AND_VALUES = 3 * 2 * 2 * 8 * 4  # of a token: layers, k and v, heads, channels, bytes


def student(kind: str, teacher=None) -> LinearizedForCausalLM:
    mixer, options = STUDENTS[kind]
    return LinearizedForCausalLM.from_teacher(teacher or byte_teacher(head_dim=8), mixer, options).eval()


@pytest.fixture
def folder(tmp_path) -> str:
    student("terrace").save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


@pytest.mark.parametrize("kind", STUDENTS)
def test_agreement(kind) -> None:
    found = bench.agreement(student(kind).double(), "sampled", 60, name=kind)
    assert (found.student, found.dtype, found.text) == (kind, "float64", "sampled")
    assert (found.tokens, found.equal) == (60, 60)
    assert found.relative_error < 1e-12
    assert found.different_tokens > 20


@pytest.mark.parametrize("text", ["greedy", "sampled"])
def test_disagreement_is_told(text, monkeypatch) -> None:
    """Of steps that see the window alone."""
    monkeypatch.setattr(hybrid, "read_state", lambda q, S: q.new_zeros(*q.shape[:2], S.shape[-1]))
    found = bench.agreement(student("sliding").double(), text, 60)
    assert found.equal < 60
    assert found.relative_error > 0.01


def test_the_students_state_does_not_grow(folder) -> None:
    speeds = bench.speeds(folder, (8, 24), turns=1)
    assert list(speeds) == [("teacher", 8), ("teacher", 24), ("student", 8), ("student", 24)]
    assert speeds["teacher", 8][1] == 8 * KEYS_AND_VALUES
    assert speeds["teacher", 24][1] == 24 * KEYS_AND_VALUES
    assert speeds["student", 8][1] == speeds["student", 24][1] == student("terrace").init_cache(1).nbytes
    assert all(tokens_per_second > 0 for tokens_per_second, _ in speeds.values())


def test_presets_have_students_too(monkeypatch) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(bench, "SIZES", bench.SIZES | small | {"intermediate_size": 32})
    model = bench.load("lolcats")
    assert model.config.mixer == "hybrid"
    assert len(model.attention_layers) == 12


@pytest.mark.parametrize("name", ["lolcat", "folder"])
def test_what_is_no_student_is_refused(name, tmp_path) -> None:
    byte_teacher().save_pretrained(tmp_path / "folder")
    tokenizer().save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="did you mean 'lolcats'" if name == "lolcat" else "no folder that"):
        bench.load(name if name == "lolcat" else str(tmp_path / name))


@pytest.mark.skipif(not bench.LINUX_MEMORY.is_file(), reason="the system does not tell a process's memory")
def test_resident_bytes() -> None:
    before = bench.resident_bytes()
    held = torch.ones(64, 2**18)  # 64 MiB
    assert 60 * 2**20 < bench.resident_bytes() - before < 80 * 2**20
    del held


# ---- at length, on a pretrained transformer where there is one -----------------------------------------------------


def stories_teacher():
    folder = Path(os.environ.get("LM_ZOO_TEST_DATA", STORIES)) / "stories260k"
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return byte_teacher(max_position_embeddings=4096)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["greedy", "sampled"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_2000_tokens_are_the_parallel_forms(kind, text) -> None:
    """In float64: of 2,000 tokens some have two likeliest ones that float32 cannot tell apart."""
    found = bench.agreement(student(kind, stories_teacher()).double(), text, 2000)
    assert found.equal == 2000, found


@pytest.mark.slow
@pytest.mark.skipif(not bench.LINUX_MEMORY.is_file(), reason="the system does not tell a process's memory")
@pytest.mark.parametrize("kind", STUDENTS)
def test_memory_at_32k_is_that_at_1k(kind, tmp_path) -> None:
    student(kind, stories_teacher()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        grown = process.submit(bench.growth, str(tmp_path), "student", (1024, 32768)).result()
    assert grown[0] == 0
    assert grown[1] < 4 * 2**20
