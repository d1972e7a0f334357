"""`lm-zoo eval synthetic`: what is trained, in which order, what is left on disk, and what is refused."""

import csv
import dataclasses
import json

import pytest
import torch
import yaml

from lm_zoo.cli import main
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic import sweep as sweeps
from lm_zoo.eval.synthetic.plan import Run, parse_mixer, plan_names, read_plan
from lm_zoo.eval.synthetic.report import part_names, write_report
from lm_zoo.eval.synthetic.training import Batches, Learner, train

TINY = {
    "title": "Parity in a minute",
    "task": "parity",
    "against": "length",
    "published": "Nothing: this is a test.",
    "model": {"num_hidden_layers": 1, "intermediate_size": 0, "initializer_range": 0.1},
    "mixers": {"negative": {"type": "deltanet", "num_heads": 1, "allow_negative_eigenvalues": True}},
    "budgets": {
        "cpu": {
            "mixers": ["negative", "attention"],
            "hidden_sizes": [16],
            "learning_rates": [0.04, 0.01],
            "enough": 0.6,
            "seeds": 2,
            "steps": 3,
            "batch_size": 4,
            "check_every": 2,
            "validation": 8,
            "jobs": 1,
            "train": [{"length": 4}],
            "test": [{"length": 4, "count": 16}, {"length": 6, "count": 16}],
        }
    },
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Makes a plan of a budget with some values changed; the file is the only one that `--task` knows."""
    folder = tmp_path / "configs"
    folder.mkdir()

    def make(budget=None, mixers=None, **content):
        changed = TINY | content | {"budgets": {"cpu": TINY["budgets"]["cpu"] | (budget or {})}}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(changed))
        monkeypatch.setattr("lm_zoo.eval.synthetic.plan._folder", lambda: folder)
        return read_plan("tiny", "cpu", mixers)

    return make


def result(*validation: float) -> dict:
    return {"validation": list(validation), "accuracy": list(validation), "parameters": 1, "state": 2, "steps": 3}


class TestPlans:
    @pytest.mark.parametrize("name", plan_names())
    def test_every_budget_can_be_built_and_drawn_from(self, name):
        for budget in ("cpu", "gpu", "paper"):
            plan = read_plan(name, budget)
            assert plan.budget.steps is None or plan.budget.epochs is None
            assert plan.budget.device == ("cpu" if budget == "cpu" else "cuda")
            assert budget == "paper" or plan.budget.minutes < {"cpu": 20, "gpu": 8}[budget]
            run = plan.run(next(iter(plan.mixers)), plan.budget.hidden_sizes[0], plan.budget.learning_rates[0], 0)
            for part in (*plan.budget.train, *plan.budget.test):
                run.task_of(part).examples(2, part["length"], torch.Generator().manual_seed(0))
            assert all("count" in part for part in plan.budget.test)

    def test_a_mixer_with_options(self):
        variants = {"narrow": {"type": "gla", "num_heads": 1}}
        assert parse_mixer("narrow:expand_k=0.5", variants)[1] == {"type": "gla", "num_heads": 1, "expand_k": 0.5}
        assert parse_mixer("deltanet:use_gate=true", variants)[1] == {"type": "deltanet", "use_gate": True}
        with pytest.raises(UserError, match="OPTION=VALUE"):
            parse_mixer("gla:num_heads", variants)

    def test_a_run_is_known_by_all_that_bears_upon_it(self, tiny):
        plan = tiny()
        run = plan.run("negative", 16, 0.01, 0)
        assert run.name == plan.run("negative", 16, 0.01, 0).name
        others = [plan.run("attention", 16, 0.01, 0), plan.run("negative", 16, 0.01, 1), tiny({"steps": 4})]
        others[2] = others[2].run("negative", 16, 0.01, 0)
        assert len({run.name, *(other.name for other in others)}) == 4
        assert tiny({"jobs": 3, "minutes": 2}).run("negative", 16, 0.01, 0).name == run.name

    def test_a_variant_may_keep_its_mixer_in_every_block(self, tiny):
        plan = tiny({"convolution": 3, "whole": ["negative"]}, ["negative", "negative:num_heads=1", "attention"])
        sizes = [plan.run(mixer, 16, 0.01, 0).training["convolution"] for mixer in plan.mixers]
        assert sizes == [None, None, 3]

    def test_parts_are_named_by_what_differs(self):
        parts = [
            {"length": 64, "count": 9, "pairs": 4, "vocabulary": 512},
            {"length": 1024, "count": 8, "vocabulary": 512},
        ]
        assert part_names(parts) == ["64 tokens, pairs 4", "1,024 tokens"]
        assert part_names(parts[:1]) == ["64 tokens"]


class TestWhatIsDue:
    """The search goes rate by rate until one is enough; the other seeds come at the best rate."""

    def due(self, plan, results):
        return [(run.learning_rate, run.seed) for run in sweeps.due(plan, results) if run.name not in results]

    def test_search(self, tiny):
        plan = tiny(mixers=["negative"])
        first, second = (plan.run("negative", 16, rate, 0).name for rate in (0.04, 0.01))
        assert self.due(plan, {}) == [(0.04, 0)]
        assert self.due(plan, {first: result(0.7, 0.6)}) == [(0.04, 1)]
        assert self.due(plan, {first: result(0.7, 0.4)}) == [(0.01, 0)]
        assert self.due(plan, {first: result(0.5, 0.5), second: result(0.5, 0.4)}) == [(0.04, 1)]
        assert self.due(plan, {first: result(0.5, 0.4), second: result(0.5, 0.5)}) == [(0.01, 1)]

    def test_a_full_grid_starts_with_all_rates(self, tiny):
        plan = tiny({"enough": 2.0}, mixers=["negative"])
        assert self.due(plan, {}) == [(0.04, 0), (0.01, 0)]


class TestTraining:
    def run(self, plan, **changes) -> Run:
        return dataclasses.replace(plan.run("negative", 16, 0.04, 0), **changes)

    def test_the_seed_decides(self, tiny):
        run = self.run(tiny())
        first, second = train(run), train(run)
        assert min(first.pop("seconds"), second.pop("seconds")) >= 0  # a tenth of a second at most
        assert first == second
        assert train(self.run(tiny(), seed=1))["loss"] != first["loss"]
        texts = [next(iter(Batches(self.run(tiny({"train": [{"length": 40}]}), seed=seed))))[0] for seed in (0, 0, 1)]
        assert torch.equal(texts[0], texts[1])
        assert not torch.equal(texts[0], texts[2])

    def test_what_is_reported(self, tiny):
        found = train(self.run(tiny()))
        assert found["steps"] == 3
        assert found["state"] == 16 * 16 + 3 * 48  # S, and three tokens of the convolution over q, k and v
        assert len(found["accuracy"]) == len(found["validation"]) == 2

    def test_it_learns(self, tiny):
        budget = {"steps": 200, "batch_size": 32, "check_every": 20, "stop_at": 0.9, "train": [{"length": 6}]}
        found = train(self.run(tiny(budget)))
        assert min(found["accuracy"]) > 0.8
        assert found["steps"] < 200

    def test_epochs_read_every_example_once(self, tiny):
        parts = [{"length": 4, "count": 10}, {"length": 6, "count": 5}]
        run = self.run(tiny({"steps": None, "epochs": 2, "train": parts}))
        batches = iter(Batches(run))
        epochs = [[next(batches) for _ in range(3 + 2)] for _ in range(2)]
        texts = [sorted(tuple(text) for tokens, _ in epoch for text in tokens.tolist()) for epoch in epochs]
        assert texts[0] == texts[1]
        assert [len(text) for text in texts[0]].count(4) == 10
        assert train(run)["steps"] == 10

    def test_parts_take_turns(self, tiny):
        run = self.run(tiny({"train": [{"length": 4}, {"length": 6}]}))
        lengths = [tokens.shape[1] for tokens, _ in (pair for pair, _ in zip(Batches(run), range(4), strict=False))]
        assert lengths == [4, 6, 4, 6]

    def test_validation_and_test_are_not_the_same_texts(self, tiny, monkeypatch):
        seen = []
        monkeypatch.setattr(Learner, "guesses", lambda self, tokens: seen.append(tokens) or tokens)
        train(self.run(tiny({"check_every": 10, "validation": 16})))
        assert len(seen) == 4
        assert not any(torch.equal(seen[part], seen[2 + part]) for part in range(2))


def run_command(folder, *options: str) -> int:
    return main(["eval", "synthetic", "--task", "tiny", "--output", str(folder), *options])


class TestSweep:
    def test_end_to_end_and_again(self, tiny, tmp_path, capsys, monkeypatch):
        tiny()
        assert run_command(tmp_path / "out") == 0
        said = capsys.readouterr().out
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        runs = list((tmp_path / "out" / "runs").glob("*.json"))
        assert content["command"] == "lm-zoo eval synthetic --task tiny --budget cpu"
        assert [row["mixer"] for row in content["rows"]] == ["negative", "attention"]
        assert all(row["seeds"] == 2 for row in content["rows"])
        assert content["chance"] == 0.5
        assert content["tests"] == ["4 tokens", "6 tokens"]
        with (tmp_path / "out" / "results.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(runs) >= 4
        assert {line["seed"] for line in lines} == {"0", "1"}
        assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
        assert said.count(" s\n") == len(runs)
        assert "mixer\td\tlayers\tstate\tlr\tseeds\t4 tokens\t6 tokens" in said

        monkeypatch.setattr(sweeps, "_train", lambda run: pytest.fail("a finished run was done again"))
        assert run_command(tmp_path / "out") == 0
        again = json.loads((tmp_path / "out" / "results.json").read_text())
        assert again["rows"] == content["rows"]

    def test_a_killed_sweep_goes_on(self, tiny, tmp_path, monkeypatch):
        plan, folder = tiny(), tmp_path / "runs"
        done, trained = [], sweeps._train

        def killed(run):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(run.name)
            return trained(run)

        monkeypatch.setattr(sweeps, "_train", killed)
        with pytest.raises(KeyboardInterrupt):
            sweeps.sweep(plan, folder, lambda run, result: None)
        assert sorted(path.stem for path in folder.iterdir()) == sorted(done)
        (folder / ".half.json.1.tmp").write_text("{")
        later = []
        monkeypatch.setattr(sweeps, "_train", lambda run: later.append(run.name) or trained(run))
        results = sweeps.sweep(plan, folder, lambda run, result: None)
        assert not set(done) & set(later)
        assert sorted(results) == sorted(done + later) == sorted(path.stem for path in folder.iterdir())

    def test_no_run_starts_after_the_last_minute(self, tiny, tmp_path, capsys):
        plan = tiny({"minutes": 0.0})
        assert sweeps.sweep(plan, tmp_path / "runs", lambda run, result: None) == {}
        assert "not run" in write_report(plan, {}, tmp_path, minutes=0.0)

    def test_a_file_that_is_no_result(self, tiny, tmp_path, capsys):
        tiny()
        (tmp_path / "out" / "runs").mkdir(parents=True)
        (tmp_path / "out" / "runs" / "x.json").write_text("{}")
        assert run_command(tmp_path / "out") == 2
        assert "is not the result of a run: delete it, or give another folder" in capsys.readouterr().err

    @pytest.mark.slow
    def test_processes_side_by_side_find_the_same(self, tiny, tmp_path):
        alone = sweeps.sweep(tiny(), tmp_path / "alone", lambda run, result: None)
        beside = sweeps.sweep(tiny({"jobs": 2}), tmp_path / "beside", lambda run, result: None)
        assert {name: found["accuracy"] for name, found in alone.items()} == {
            name: found["accuracy"] for name, found in beside.items()
        }


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--task", "tine"], "--task: there is no task 'tine' (did you mean 'tiny'?); known: tiny"),
            (["--budget", "cpp"], "--budget: tiny has no budget 'cpp' (did you mean 'cpu'?); known: cpu"),
            (["--mixers", "dltanet"], "--mixers: there is no mixer 'dltanet' (did you mean 'deltanet'?)"),
            (["--mixers", "gla:heads=2"], "--mixers: unknown option 'heads' for the mixer 'gla' (did you mean"),
            (["--mixers", "gla:num_heads=3"], "num_heads = 3 cannot share evenly"),
            (["--mixers", "gla:num_heads"], "'num_heads' of 'gla:num_heads' must be OPTION=VALUE"),
            (["--jobs", "0"], "'0' is not a whole number of at least 1"),
        ],
    )
    def test_one_line_before_any_training(self, tiny, tmp_path, capsys, monkeypatch, options, message):
        tiny()
        monkeypatch.setattr(sweeps, "_train", lambda run: pytest.fail("trained in spite of bad input"))
        assert run_command(tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_no_gpu(self, tiny, tmp_path, capsys, monkeypatch):
        tiny({"device": "cuda"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert run_command(tmp_path / "out") == 2
        assert "--budget: cpu wants a GPU for CUDA, and there is none here" in capsys.readouterr().err
