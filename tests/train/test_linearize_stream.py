"""Linearization of a teacher whose weights stay on the disk: the same result as with all of them in memory."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_close
from linearize_fixtures import byte_teacher, small_spec, stage, tokenizer, write_text
from tiny_teachers import TEACHERS
from transformers import AutoModelForCausalLM

from lm_zoo.errors import UserError
from lm_zoo.train.linearize import linearize, stream_run
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.linearize.stream_student import HEAD, StreamedStudent, streamed_teacher
from lm_zoo.train.linearize.stream_weights import INDEX, Checkpoint
from lm_zoo.train.linearize.work import work_path

QUICK = ("llama", "gemma3-cap", "gpt_neox", "gpt2")  # norms, scales, names and biases of all kinds
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TEACHERS]
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
        assert memory["continuation"][who].startswith(text.rstrip("\ufffd"))  # it may end within a character
    for name, of_stage in memory["stages"].items():
        for key in ("trained_parameters", "steps", "tokens", "best_step"):
            assert stream["stages"][name][key] == of_stage[key]
        for ours, theirs in zip(stream["stages"][name]["history"], of_stage["history"], strict=True):
            assert_near(list(ours.values()), list(theirs.values()), tolerance)
    for key in ("family", "parameters", "layers", "kept_layers", "held_out_tokens", "state", "spec"):
        assert stream[key] == memory[key]


@pytest.mark.parametrize("family", FAMILIES)
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


def test_registered_mixers_are_replaced_step_by_step(start, tmp_path) -> None:
    """Random first weights, matched norms, and mixers that go on learning beside the adapters."""
    save_teacher(tmp_path / "teacher")
    recover = stage(4, kl=1.0, train_mixers=True, replacement_steps=2)
    spec = small_spec(transfer=2, recover=recover, mixer="gated_deltanet", options={}, match_norms=True)
    memory, expected = start("memory", spec)
    _, report = start("stream", spec, mode="stream", max_memory=ROOM)
    assert_same_report(report, expected, 1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stream").state_dict()
    for name, weight in memory.state_dict().items():
        assert_close(loaded[name], weight, 1e-3)


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


@torch.no_grad()
def test_one_part_is_in_memory_at_a_time(tmp_path) -> None:
    expected = save_teacher(tmp_path)
    student = StreamedStudent.from_teacher(streamed_teacher(tmp_path), "hybrid", {"window": 64}).eval()
    student.read_from(Checkpoint(tmp_path))
    parts = [student.get_output_embeddings(), *student.teacher.model.layers]

    def held() -> list[bool]:
        return [not next(part.parameters()).isnan().any() for part in parts]

    assert not any(held())
    assert student.get_input_embeddings().weight.untyped_storage().nbytes() == 4
    with student.holding(1), student.holding(1):
        assert held() == [False, False, True, False]
    with student.holding(HEAD):
        assert held() == [True, False, False, False]
    assert not any(held())
    ids = torch.tensor([list(b"the state of the token")])
    assert_close(student(ids).logits, expected(ids).logits, 1e-5)  # the window is longer than the text
    assert not any(held())


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
from linearize_fixtures import small_spec
from lm_zoo.train.linearize import linearize
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.memory import STATUS

data = TextOptions(files=({text!r},), cache_dir={cache!r})
linearize({teacher!r}, small_spec(transfer=2, recover=2), data=data, output={output!r}, prompt="the state",
          log=lambda line: None, **{options!r})
print(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
def test_the_process_stays_below_max_memory(tmp_path) -> None:
    teacher = save_teacher(
        tmp_path / "teacher", shard="100MB", num_hidden_layers=12, hidden_size=256, intermediate_size=8192
    )
    weights = sum(parameter.nbytes for parameter in teacher.parameters())
    del teacher
    places = {"text": write_text(tmp_path / "text.txt"), "teacher": str(tmp_path / "teacher")}
    places |= {"cache": str(tmp_path / "cache"), "tests": str(Path(__file__).parents[1])}
    limit = 900 * 2**20
    peaks = {}
    for name, options in {"stream": {"mode": "stream", "max_memory": limit}, "memory": {}}.items():
        code = MEMORY.format(output=str(tmp_path / name), options=options, **places)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout) * 1024
    assert peaks["stream"] < limit
    assert peaks["memory"] > limit
    assert peaks["memory"] - peaks["stream"] > 0.75 * weights


def test_adapters_are_merged_as_they_are_in_memory(start, tmp_path) -> None:
    """In a base layer that stores its weight the other way round, too."""
    save_teacher(tmp_path / "teacher", "gpt2")
    student, _ = start(
        "out", small_spec(transfer=None, recover=stage(2, learning_rate=0.1)), mode="stream", max_memory=ROOM
    )
    before, after = (Checkpoint(tmp_path / name) for name in ("teacher", "out"))
    assert set(student.adapters) == {
        f"transformer.h.{n}.attn.{m}.weight" for n in range(3) for m in ("c_attn", "c_proj")
    }
    for name in before.entries:
        teachers, ours = (
            weights.read(f"{prefix}{name}", torch.float32, torch.device("cpu"))
            for weights, prefix in ((before, ""), (after, "teacher."))
        )
        assert torch.equal(teachers, ours) == (name not in student.adapters), name


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


@pytest.mark.parametrize("killed_in", ["transfer", pytest.param("recover", marks=pytest.mark.slow)])
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


def move_weight(teacher: Path) -> None:
    index = json.loads((teacher / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.up_proj.weight"] = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["lm_head.weight"] = next(iter(index["weight_map"].values()))
    (teacher / INDEX).write_text(json.dumps(index))


def promise_a_weight(teacher: Path) -> None:
    index = json.loads((teacher / INDEX).read_text())
    index["weight_map"]["model.layers.9.weight"] = index["weight_map"]["model.norm.weight"]
    (teacher / INDEX).write_text(json.dumps(index))


def forget_a_weight(teacher: Path) -> None:
    index = json.loads((teacher / INDEX).read_text())
    file = index["weight_map"].pop("model.layers.2.mlp.up_proj.weight")
    for name in [name for name, other in index["weight_map"].items() if other == file]:
        del index["weight_map"][name]
    (teacher / INDEX).write_text(json.dumps(index))


def cut(teacher: Path) -> None:
    path = sorted(teacher.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])


def garble(teacher: Path) -> None:
    sorted(teacher.glob("*.safetensors"))[1].write_bytes(b"garbage")


def pickle_weights(teacher: Path) -> None:
    for path in teacher.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, teacher / "pytorch_model.bin")


def widen(teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


BROKEN = {
    "a missing shard": (
        lambda teacher: sorted(teacher.glob("*.safetensors"))[1].unlink(),
        r"model-00002-of-\d+\.safetensors is missing, and model\.safetensors\.index\.json names it",
    ),
    "no index": (lambda teacher: (teacher / INDEX).unlink(), "has no weights"),
    "a damaged index": (lambda teacher: (teacher / INDEX).write_text("{"), "index.json is damaged"),
    "an index that promises too much": (promise_a_weight, "has no tensor model.layers.9.weight, which model"),
    "an index that is wrong": (move_weight, "has no tensor .*weight, which model"),
    "a weight that no file has": (forget_a_weight, "lacks the weight model.layers.2"),
    "a shard that is cut off": (cut, "safetensors is cut off"),
    "a shard that is none": (garble, "is no safetensors file, or damaged"),
    "another format": (pickle_weights, "has no model.safetensors, and --mode stream reads no other format"),
    "another shape": (widen, r"has the shape \[40, 32\], and config.json asks for \[48, 32\]"),
}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_told_before_the_start(start, tmp_path, teacher_folder, case) -> None:
    spoil, message = BROKEN[case]
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    spoil(tmp_path / "teacher")
    with pytest.raises(UserError, match=message):
        start("out", small_spec(), mode="stream", max_memory=ROOM)
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "text.txt"}


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"max_memory": None}, {}, "give --max-memory, such as 8GiB"),
        (
            {"max_memory": 10**6},
            {},
            r"--max-memory 1.0 MiB is too little: \w+ needs [\d,.]+ [MG]iB, [\d,.]+ [MG]iB of it",
        ),
        ({}, {"recover.parameters": "all"}, "recover.parameters: all holds gradients"),
        ({"mode": "memory"}, {}, "max_memory is a bound for mode stream"),
        ({"mode": "streams"}, {}, "mode must be one of 'memory', 'stream'"),
    ],
)
def test_what_cannot_stream_is_told_before_the_start(
    start, tmp_path, teacher_folder, options, overrides, message
) -> None:
    with pytest.raises(ValueError, match=message):
        start(
            "out",
            small_spec(),
            teacher_folder,
            **{"mode": "stream", "max_memory": ROOM, "overrides": overrides} | options,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_a_model_in_memory_is_no_teacher_of_a_stream(start) -> None:
    with pytest.raises(UserError, match="mode stream takes one by its folder or name"):
        start("out", small_spec(), byte_teacher(), mode="stream", max_memory=ROOM, tokenizer=tokenizer())


def test_a_full_disk_is_told_before_the_start(start, tmp_path, teacher_folder, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"has 0\.1 MiB free, and [\d.]+ MiB are needed: [\d.]+ MiB for hidden states and checkpoints"
    with pytest.raises(UserError, match=message):
        start("out", small_spec(), teacher_folder, mode="stream", max_memory=ROOM)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "text.txt"}


def test_a_run_goes_on_in_the_mode_that_it_was_started_in(start, tmp_path, teacher_folder, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def kill(run):
        run._save()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stream_run.StreamRun, "_after_step", kill)
        with pytest.raises(Killed):
            start("out", small_spec(), teacher_folder, mode="stream", max_memory=ROOM)
    with pytest.raises(UserError, match="was started with mode = stream, now it is None"):
        start("out", small_spec(), teacher_folder, resume=True)
