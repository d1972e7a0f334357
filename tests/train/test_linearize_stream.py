"""Linearization of a teacher whose weights stay on the disk: the same result as with all of them in memory."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_close
from linearize_fixtures import byte_teacher, small_spec, stage, tokenizer, write_text
from safetensors.torch import load_file
from tiny_teachers import TEACHERS
from transformers import AutoModelForCausalLM

from lm_zoo.errors import UserError
from lm_zoo.train.linearize import linearize, stream_run
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.linearize.stream_student import StreamedStudent, streamed_teacher
from lm_zoo.train.linearize.stream_weights import Checkpoint
from lm_zoo.train.linearize.work import work_path

ROOM = 2**40


def save_teacher(folder: Path, family: str = "llama", shard: str = "20KB", **changes):
    teacher = byte_teacher(family, **changes)
    teacher.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return teacher


@pytest.fixture
def start(tmp_path):
    """Linearizes the teacher in the folder "teacher"."""
    text = write_text(tmp_path / "text.txt")

    def run(output, spec, teacher=tmp_path / "teacher", **options):
        return linearize(
            teacher,
            spec,
            data=TextOptions(files=(text,), cache_dir=tmp_path / "cache"),
            output=tmp_path / output,
            **{"log": lambda line: None, "prompt": "the state", **options},
        )

    return run


def assert_near(ours: list[float | None], theirs: list[float | None], tolerance: float) -> None:
    assert [value is None for value in ours] == [value is None for value in theirs]
    given = [[value for value in values if value is not None] for values in (ours, theirs)]
    assert given[0] == pytest.approx(given[1], rel=tolerance)


def assert_same_report(stream: dict, memory: dict, tolerance: float) -> None:
    for name, value in memory["perplexity"].items():
        assert stream["perplexity"][name] == pytest.approx(value, rel=tolerance), name
    for when, errors in memory["layer_error"].items():
        assert_near(stream["layer_error"][when], errors, tolerance)
    for who, text in stream["continuation"].items():
        assert memory["continuation"][who].startswith(text)
    for name, of_stage in memory["stages"].items():
        for key in ("trained_parameters", "steps", "tokens", "best_step"):
            assert stream["stages"][name][key] == of_stage[key]
        for ours, theirs in zip(stream["stages"][name]["history"], of_stage["history"], strict=True):
            assert_near(list(ours.values()), list(theirs.values()), tolerance)
    for key in ("family", "parameters", "layers", "kept_layers", "held_out_tokens", "state", "spec"):
        assert stream[key] == memory[key]


@pytest.mark.parametrize("family", TEACHERS)
def test_it_is_what_comes_out_in_memory(start, tmp_path, family) -> None:
    save_teacher(tmp_path / "teacher", family)
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    spec = small_spec(transfer=3, recover=stage(2, kl=1.0), keep_layers=[1])
    _, memory = start("memory", spec)
    student, stream = start("stream", spec, mode="stream", max_memory=ROOM)
    assert_same_report(stream, memory, 1e-4)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("stream", "memory"))
    for name, weight in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], weight, 1e-4)
    ids = torch.tensor([list(b"the state of the token")])
    assert_close(student(ids).logits, ours(ids).logits, 1e-5)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("stream", "memory")]
    assert configs[0] == configs[1]
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("stream", "memory")]
    assert {name for name in files[0] if "safetensors" not in name} == files[1] - {"model.safetensors"}


def in_float64(teacher: Path, monkeypatch) -> torch.nn.Module:
    monkeypatch.setattr(stream_run, "streamed_teacher", partial(streamed_teacher, dtype=torch.float64))
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)


def test_each_layer_learns_what_it_learns_beside_the_others(start, tmp_path, monkeypatch) -> None:
    """In float64 but for the losses, which are in float32; the steps are too few for that to grow."""
    save_teacher(tmp_path / "teacher")
    teacher = in_float64(tmp_path / "teacher", monkeypatch)
    spec = small_spec(transfer=stage(6, accumulate=2, validations=3), recover=None)
    memory, _ = start("memory", spec, teacher=teacher, tokenizer=tokenizer())
    stream, report = start("stream", spec, mode="stream", max_memory=ROOM)
    assert stream.dtype == torch.float64
    assert report["stages"]["transfer"]["best_step"] == 6
    for module, other in zip(stream.attention_layers, memory.attention_layers, strict=True):
        for name, weight in other.mixer.state_dict().items():
            assert_close(module.mixer.state_dict()[name], weight, 1e-7)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from linearize_fixtures import small_spec, stage
from lm_zoo.train.linearize import linearize
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.linearize.stream_run import StreamRun
after_step = StreamRun._after_step

def kill(run):
    after_step(run)
    if run.stage == {stage!r} and run.loop.step == 2 and getattr(run.loop, "layer", 1) == 1:
        os.kill(os.getpid(), signal.SIGKILL)

StreamRun._after_step = kill
spec = small_spec(transfer=stage(4, accumulate=2), recover=stage(3, kl=1.0, train_mixers=True))
data = TextOptions(files=({text!r},), cache_dir={cache!r})
linearize({teacher!r}, spec, data=data, output={output!r}, prompt="the state", mode="stream", max_memory=2**40,
          checkpoint_seconds=0, log=lambda line: None)
"""


@pytest.mark.parametrize("killed_in", ["transfer", "recover"])
def test_killed_and_resumed_is_the_uninterrupted_run(start, tmp_path, killed_in) -> None:
    save_teacher(tmp_path / "teacher")
    spec = small_spec(transfer=stage(4, accumulate=2), recover=stage(3, kl=1.0, train_mixers=True))
    _, expected = start("whole", spec, mode="stream", max_memory=ROOM)
    places = {"text": "text.txt", "teacher": "teacher", "output": "parts", "cache": "cache"}
    places = {name: str(tmp_path / path) for name, path in places.items()}
    code = KILLED.format(stage=killed_in, tests=str(Path(__file__).parents[1]), **places)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "parts").exists()
    _, report = start("parts", spec, mode="stream", max_memory=ROOM, resume=True)
    assert not work_path(tmp_path / "parts").exists()
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in files:
        if not name.startswith("report"):
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for result in (expected, report):
        del result["peak_memory_bytes"]
        for entry in result["stages"].values():
            assert entry.pop("seconds") > 0
    assert report == expected
