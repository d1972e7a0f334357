"""Specs: every preset makes a student, every wrong word is named."""

import pytest
from linearize_fixtures import byte_teacher, small_spec, small_student, stage

from lm_zoo.errors import UserError
from lm_zoo.train.linearize import LinearizeSpec
from lm_zoo.train.linearize.run import fitting
from lm_zoo.train.linearize.spec import presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_makes_a_student(name) -> None:
    spec = LinearizeSpec.load(name)
    student = small_student(dict(spec.options), mixer=spec.mixer)
    assert all(layer.mixer is not None for layer in student.attention_layers)
    assert spec.stages
    assert LinearizeSpec.from_dict(spec.as_dict()) == spec


BAD = {
    "unknown key": ({"mixer": "hybrid", "windows": 3}, r"unknown key 'windows'"),
    "unknown key of a stage": (
        {"mixer": "hybrid", "transfer": {"tokens": 1, "learning_rat": 1}},
        r"unknown key 'transfer.learning_rat' \(did you mean 'learning_rate'\?\)",
    ),
    "key of the other stage": (
        {"mixer": "hybrid", "transfer": {"tokens": 1, "learning_rate": 1, "rank": 8}},
        "unknown key 'transfer.rank'",
    ),
    "missing": ({"mixer": "hybrid", "recover": {"tokens": 1}}, "recover.learning_rate is missing"),
    "no mapping": ([1], "expected keys and their values"),
    "stage is no mapping": ({"mixer": "hybrid", "transfer": 3}, "transfer must be"),
    "wrong type": (
        {"mixer": "hybrid", "recover": {"tokens": 1.5, "learning_rate": 1}},
        "recover.tokens must be a whole number, got 1.5",
    ),
    "true is no number": (
        {"mixer": "hybrid", "recover": {"tokens": True, "learning_rate": 1}},
        "recover.tokens must be a whole number",
    ),
    "wrong choice": (
        {"mixer": "hybrid", "transfer": {"tokens": 1, "learning_rate": 1, "loss": "l1"}},
        "transfer.loss must be one of normalized_mse, mse, none, got 'l1'",
    ),
    "not finite": (
        {"mixer": "hybrid", "recover": {"tokens": 1, "learning_rate": float("nan")}},
        "recover.learning_rate must be a number",
    ),
    "below the least": (
        {"mixer": "hybrid", "recover": {"tokens": 0, "learning_rate": 1}},
        "recover.tokens=0 must be at least 1",
    ),
    "nothing to learn": (
        {"mixer": "hybrid", "recover": {"tokens": 1, "learning_rate": 1, "next_token": 0}},
        "nothing to learn",
    ),
    "no replacement": (
        {"mixer": "hybrid", "recover": {"tokens": 1, "learning_rate": 1, "replacement_steps": 0}},
        "recover.replacement_steps=0 must be at least 1",
    ),
    "kept twice": (
        {"mixer": "hybrid", "keep_layers": [0], "keep_every": 4},
        "keep_layers and keep_every both say",
    ),
    "no window where one is needed": (
        {"mixer": "hybrid", "options": {"window": 0, "window_kind": "terrace"}},
        "options.window=0 leaves no window",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case) -> None:
    values, message = BAD[case]
    with pytest.raises(UserError, match=message):
        LinearizeSpec.from_dict(values)


def test_values_come_as_yaml_gives_them(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mixer: hybrid\nkeep_layers: [0, -1]\nrecover: {tokens: 1_000, learning_rate: 1e-3, alpha: 4}\n")
    spec = LinearizeSpec.load(path)
    assert spec.keep_layers == (0, -1)
    assert (spec.recover.tokens, spec.recover.learning_rate, spec.recover.alpha) == (1000, 0.001, 4.0)


@pytest.mark.parametrize("content", ["mixer: [1, 2", "mixer: hybrid\nmixers: x\n", "\xff"])
def test_a_bad_file_is_named(tmp_path, content) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.yaml"):
        LinearizeSpec.load(path)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match=r"'lolcat' \(did you mean 'lolcats'\?\)"):
        LinearizeSpec.load("lolcat")


def test_overrides_reach_every_level() -> None:
    spec = small_spec().override({"seed": 3, "options.window": 8, "recover.kl": 1, "recover.projections": ["q"]})
    assert (spec.seed, spec.options["window"], spec.options["window_kind"]) == (3, 8, "sliding")
    assert (spec.recover.kl, spec.recover.projections) == (1.0, ("q",))
    assert spec.override({"recover": None}).stages.keys() == {"transfer"}
    for name, message in [
        ("transfer.kl", "unknown key 'transfer.kl'"),
        ("recovery.kl", "unknown key 'recovery.kl'"),
        ("seed.kl", "'seed.kl' is no key"),
    ]:
        with pytest.raises(UserError, match=message):
            spec.override({name: 1})
    with pytest.raises(UserError, match="the preset has no such stage"):
        spec.override({"transfer": None}).override({"transfer.batch": 1})


def test_another_mixer_has_options_of_its_own() -> None:
    spec = small_spec()
    assert spec.override({"mixer": "gla"}).options == {}
    assert spec.override({"options.window": 8, "mixer": "liger"}).options == {"window": 8}
    assert spec.override({"mixer": "liger", "options": {"share": 0.25}}).options == {"share": 0.25}
    assert spec.override({"mixer": spec.mixer, "options.beta": "complement"}).options["window"] == 4


def test_steps_end_with_the_tokens_or_with_the_passes() -> None:
    stage = small_spec().override({"recover.accumulate": 2, "recover.tokens": 32 * 8 * 10}).recover
    assert stage.steps(rows=1000) == 10  # 8 rows of 32 tokens in a step
    assert small_spec().override({"recover.max_epochs": 2}).recover.steps(rows=6) == 3


def test_every_nth_layer_is_kept_at_any_depth() -> None:
    def kept(layers: int, **values) -> tuple[int, ...]:
        return fitting(small_spec(keep_every=4).override(values), byte_teacher(num_hidden_layers=layers)).keep_layers

    assert kept(8) == (3, 7)
    assert kept(5) == (3,)
    assert kept(3) == ()
    assert kept(5, keep_layers=[0, -1]) == (0, 4)
    assert kept(5, keep_every=2) == (1, 3)


def test_replacement_steps_share_the_text() -> None:
    spec = small_spec(recover=stage(12, replacement_steps=3))
    assert [spec.recover.steps(rows=1000), spec.recover.part.steps(rows=1000)] == [12, 4]
    few_rows = spec.override({"recover.tokens": 10**9, "recover.max_epochs": 6}).recover
    assert [few_rows.steps(rows=8), few_rows.part.steps(rows=8)] == [12, 4]
    assert fitting(spec, byte_teacher(num_hidden_layers=2)).recover.replacement_steps == 2
