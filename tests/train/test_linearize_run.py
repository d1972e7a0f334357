"""A whole linearization: what it leaves, that it can be interrupted, and what stops it."""

import json
import signal

import pytest
import torch
from compare import assert_close
from linearize_fixtures import byte_teacher, small_spec, small_student, stage, tokenizer, write_text
from tiny_teachers import TEACHERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.train.checkpoints import Interrupted
from lm_zoo.train.linearize import controls, linearize
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.linearize.estimate import trained_parameters
from lm_zoo.train.linearize.report import summary
from lm_zoo.train.linearize.run import Run
from lm_zoo.train.linearize.work import work_path


@pytest.fixture
def start(tmp_path):
    """Linearizes a new tiny teacher on the text."""
    text = write_text(tmp_path / "text.txt")

    def run(output="out", spec=None, family="llama", teacher=None, files=(text,), **options):
        return linearize(
            byte_teacher(family) if teacher is None else teacher,
            small_spec() if spec is None else spec,
            data=TextOptions(files=files, cache_dir=tmp_path / "cache"),
            output=tmp_path / output,
            tokenizer=tokenizer(),
            **{"log": lambda line: None, "prompt": "the state", **options},
        )

    return run


def test_the_folder_is_a_model_and_its_report(start, tmp_path) -> None:
    student, report = start()
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out", "text.txt"}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(loaded, LinearizedForCausalLM)
    assert AutoTokenizer.from_pretrained(out)("the")["input_ids"] == list(b"the")
    assert (out / "generation_config.json").is_file()
    for name, weight in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert report["continuation"]["student"] == controls.continuation(loaded, tokenizer(), "the state")
    assert report["continuation"]["teacher"] == controls.continuation(byte_teacher(), tokenizer(), "the state")


def test_the_report_says_what_happened(start) -> None:
    _, report = start(spec=small_spec(keep_layers=[-1], transfer=30, recover=stage(20, kl=1.0)))
    perplexity = report["perplexity"]
    assert list(perplexity) == [
        "teacher", "untrained", "window_only", "transfer", "recover", "linear_part_ablated", "final",
    ]  # fmt: skip
    assert perplexity["final"] == perplexity["recover"]
    assert report["kept_layers"] == [2]
    errors = report["layer_error"]
    assert errors["before"][2] is errors["after"][2] is None
    assert all(after < before for after, before in zip(errors["after"][:2], errors["before"][:2], strict=True))
    assert report["gap_closed"] == controls.gap_closed(
        perplexity["window_only"], perplexity["teacher"], perplexity["final"]
    )
    transfer, recover = report["stages"]["transfer"], report["stages"]["recover"]
    assert (transfer["steps"], recover["steps"]) == (30, 20)
    # W of 4 heads for q and for k, 6 by 6, and the gate; rank 8 for q, o of 24, k, v of 12 channels, all to or from 32
    assert transfer["trained_parameters"] == 2 * (2 * 4 * 36 + 4)
    assert recover["trained_parameters"] == 3 * 8 * (2 * (32 + 24) + 2 * (32 + 12))
    assert 0 < transfer["tokens"] <= 30 * 4 * 32
    for entry in (transfer, recover):
        best = min(entry["history"], key=lambda line: line["held_out"])
        assert best["held_out"] < entry["history"][0]["held_out"]
        assert entry["best_step"] == best["step"]


def test_layers_replaced_in_steps_are_reported_step_by_step(start, tmp_path, monkeypatch) -> None:
    seeds = {}
    after_step = Run._after_step

    def note(run):
        seeds[run.stage] = run.loop.seed
        after_step(run)

    monkeypatch.setattr(Run, "_after_step", note)
    recover = stage(12, replacement_steps=3, kl=1.0)
    spec = small_spec(mixer="gated_deltanet", options={}, match_norms=True, recover=recover)
    _, report = start(spec=spec)
    names = ["teacher", "untrained", "transfer", "replace_1", "replace_2", "recover", "linear_part_ablated", "final"]
    assert list(report["perplexity"]) == names
    assert report["gap_closed"] is None
    assert list(report["stages"]) == ["transfer", "replace_1", "replace_2", "recover"]
    assert len(set(seeds.values())) == len(report["stages"])  # each has the rows in an order of its own
    assert [report["stages"][name]["steps"] for name in ("replace_1", "replace_2", "recover")] == [4, 4, 4]
    for name, part in report["stages"].items():  # as the estimate has it
        options = spec.transfer if name == "transfer" else spec.recover
        assert part["trained_parameters"] == trained_parameters(small_student({}, mixer="gated_deltanet"), options)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'after replacement step 2</td><td class="number">{report["perplexity"]["replace_2"]:.3f}' in page
    assert any("after replacement step 1" in line for line in summary(report))


def test_the_page_needs_nothing_else(start, tmp_path) -> None:
    _, report = start(prompt="<b>the state</b>")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "&lt;b&gt;the state" in page
    assert "<b>the" not in page
    assert f"{report['perplexity']['window_only']:.3f}" in page
    for word in ("<script", "<img", "<link", "@import", "src="):
        assert word not in page


@pytest.mark.parametrize("family", TEACHERS)
def test_every_family_goes_through(start, tmp_path, family) -> None:
    student, report = start(family=family, spec=small_spec(transfer=2, recover=2))
    assert report["layers"] == 3
    ids = torch.tensor([list(b"the state of the token")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(loaded(ids).logits, student(ids).logits, 1e-6)


def test_a_window_longer_than_the_text_is_the_teacher(start) -> None:
    spec = small_spec(transfer=None, recover=None, options={"window": 1024, "window_kind": "sliding"})
    _, report = start(spec=spec)
    perplexity = report["perplexity"]
    assert perplexity["untrained"] == pytest.approx(perplexity["teacher"], rel=1e-5)
    assert perplexity["window_only"] == pytest.approx(perplexity["teacher"], rel=1e-5)
    assert max(report["layer_error"]["before"]) < 1e-9


def test_all_layers_kept_is_the_teacher(start) -> None:
    student, report = start(spec=small_spec(keep_layers=[0, 1, -1]))
    assert report["stages"] == {}
    assert report["times_the_teachers"] == 1
    ids = torch.tensor([list(b"the state of the token")])
    assert_close(student(ids).logits, byte_teacher()(ids).logits, 1e-5)


def test_mixers_of_a_16_bit_teacher_are_trained_in_32_bits(start, tmp_path, monkeypatch) -> None:
    seen = set()
    after_step = Run._after_step

    def note(run):
        seen.update(parameter.dtype for parameter in run.loop.parameters.values())
        after_step(run)

    monkeypatch.setattr(Run, "_after_step", note)
    _, report = start(teacher=byte_teacher().bfloat16(), spec=small_spec(transfer=20, recover=2))
    assert seen == {torch.float32}
    assert max(report["layer_error"]["after"]) < max(report["layer_error"]["before"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_best_weights_are_kept(start) -> None:
    """A rate that makes things worse leaves the student as it was."""
    spec = small_spec(transfer=stage(6, learning_rate=300.0), recover=None)
    _, report = start(spec=spec)
    assert report["stages"]["transfer"]["best_step"] == 0
    assert report["layer_error"]["after"] == report["layer_error"]["before"]
    assert report["perplexity"]["final"] == report["perplexity"]["untrained"]


def test_the_seed_says_what_the_mixers_start_with(start) -> None:
    spec = small_spec(mixer="gated_deltanet", options={}, transfer=None, recover=None)
    values = [start(str(n), spec, overrides={"seed": seed})[1]["perplexity"] for n, seed in enumerate((0, 0, 1))]
    assert values[0] == values[1] != values[2]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("kill_in", "at", "parts"),
    [("transfer", 2, 1), ("recover", 0, 1), ("recover", 3, 1), ("replace_1", 1, 2), ("recover", 1, 2)],
)
@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_killed_and_resumed_is_the_whole_run(start, tmp_path, monkeypatch, kill_in, at, parts, parameters) -> None:
    options = {"window": 4, "window_kind": "terrace", "window_dropout": 0.5}
    recover = stage(4, parameters=parameters, kl=1.0, train_mixers=True, accumulate=2, replacement_steps=parts)
    spec = small_spec(transfer=stage(4, accumulate=2), recover=recover, options=options)
    whole, expected = start("whole", spec)
    after_step = Run._after_step

    def kill(run):
        if run.stage == kill_in and run.loop.step == at + 1:
            raise Killed  # one step after the checkpoint
        after_step(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", kill)
        patched.setattr("lm_zoo.train.linearize.work.WorkFolder.is_due", property(lambda work: True))
        with pytest.raises(Killed):
            start("parts", spec)
    assert not (tmp_path / "parts").exists()
    assert work_path(tmp_path / "parts").is_dir()
    resumed, report = start("parts", spec, resume=True)
    assert not work_path(tmp_path / "parts").exists()
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for result in (expected, report):
        del result["peak_memory_bytes"]
        for entry in result["stages"].values():
            assert entry.pop("seconds") > 0
    assert report == expected


def test_a_signal_saves_and_stops(start, tmp_path, monkeypatch) -> None:
    after_step = Run._after_step

    def send(run):
        if run.loop.step == 2:
            signal.raise_signal(signal.SIGTERM)
        after_step(run)

    monkeypatch.setattr(Run, "_after_step", send)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        start()
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    state = torch.load(stopped.value.checkpoint, weights_only=True)
    assert (state["stage"], state["loop"]["step"]) == ("transfer", 2)


def test_unfinished_runs_are_neither_lost_nor_mixed_up(start, tmp_path, monkeypatch) -> None:
    def kill(run):
        run._save()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", kill)
        with pytest.raises(Killed):
            start()
    with pytest.raises(UserError, match="continue it with --resume"):
        start()
    with pytest.raises(UserError, match=r"was started with spec\.recover\.kl = 0\.0, now it is 1\.0"):
        start(resume=True, overrides={"recover.kl": 1})
    with pytest.raises(UserError, match="there is no unfinished run"):
        start("other", resume=True)
    (work_path(tmp_path / "out") / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        start(resume=True)


def test_an_output_that_exists_is_left_alone(start, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        start()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["transfer", "recover"])
def test_a_loss_that_is_not_finite_stops_the_run(start, tmp_path, name) -> None:
    spec = small_spec(**{name: stage(4, learning_rate=1e30, schedule="constant", weight_decay=1e30)})
    with pytest.raises(UserError, match=rf"the loss of the stage {name} is not finite after step \d of 4; lower"):
        start(spec=spec)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "text.txt"}


def test_the_teacher_can_write_the_text_itself(start, tmp_path) -> None:
    spec = small_spec().override({"transfer.tokens": 2000, "recover.tokens": 2000, "val_fraction": 0.3})
    _, first = start("first", spec, files=("self",))
    _, second = start("second", spec, files=("self",))
    assert first["perplexity"] == second["perplexity"]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "text.txt", "first", "second"} - {"cache"}


def test_what_the_teacher_writes_is_only_trained_on(start) -> None:
    """Beside the given text, of which the same part is held out."""
    stage_of = {"tokens": 10**6, "max_epochs": 1}
    spec = small_spec(transfer=stage(1) | stage_of, recover=None)
    _, without = start("without", spec)
    _, more = start("more", spec, overrides={"self_tokens": 2000})
    assert more["held_out_tokens"] == without["held_out_tokens"]
    assert more["perplexity"]["untrained"] == without["perplexity"]["untrained"]
    added = more["stages"]["transfer"]["tokens"] - without["stages"]["transfer"]["tokens"]
    assert added > 1500


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"keep_layers": [3]}, "layers 0 to 2, and no layer 3"),
        ({"mixer": "hybrids"}, "did you mean 'hybrid'"),
        ({"options.window": -1}, "window"),
        ({"options.feature_map": "hedgehogs"}, "feature_map"),
        ({"options.windows": 3}, "did you mean 'window'"),
    ],
)
def test_what_the_student_cannot_be_is_named(start, tmp_path, overrides, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        start(overrides=overrides)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}
