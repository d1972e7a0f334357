"""The command `lm-zoo eval harness`: task files, their results, and one line for what cannot be."""

import importlib.util
import json
import logging
import os
import random
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from linearize_fixtures import STORIES, documents
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, manager
from tiny_teachers import new_teacher

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.cli import main
from lm_zoo.eval.harness import recall
from lm_zoo.eval.harness.evaluation import harness
from lm_zoo.eval.harness.tasks import OWN
from lm_zoo.eval.loading import load_model
from lm_zoo.train.tokenizers import byte_tokenizer

CHOICE = """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{passage}} {{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: own_writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [e], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
GROUP = "group: own_group\ntask: [own_choice, own_rolling]\n"
RECALL = {
    "recall_swde": "hazyresearch/based-swde-v2",
    "recall_fda": "hazyresearch/based-fda",
    "recall_squad": "hazyresearch/based-squad",
    "recall_triviaqa": "hazyresearch/based_triviaqa",
    "recall_nq": "hazyresearch/based_nq_2048",
    "recall_drop": "hazyresearch/based_drop",
}


def write_tasks(folder, **files):
    """Task files that read rows from a file beside them, all in a folder of their own."""
    texts = iter(documents(200, words=12))
    rows = []
    for passage, number in [(next(texts), number) for _ in range(4) for number in range(3)]:
        choices = [next(texts)[:20].strip() or "x" for _ in range(4)]
        rows.append({"passage": passage * 2, "question": next(texts), "choices": choices, "label": number})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in files.items():
        config = yaml.safe_load(text)
        if "task" in config and "group" not in config and config.get("dataset_path") is None:
            data = {"data_files": {"validation": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
            config |= {"dataset_path": "json", "dataset_kwargs": data, "validation_split": "validation"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder, choice=CHOICE, rolling=ROLLING, writing=WRITING, group=GROUP)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    zoo().save_pretrained(folder)
    return folder


@pytest.fixture
def few_defaults(monkeypatch, tmp_path):
    """lm-eval's own 14,000 task files take long to read: a few stand for them."""
    folder = tmp_path / "defaults"
    folder.mkdir()
    for name in ("arc_easy", "arc_challenge", "hellaswag"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: somebody/{name}\n")
    monkeypatch.setattr(manager, "__file__", str(folder / "manager.py"))


def zoo():
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    return ZooForCausalLM(ZooConfig.preset("hybrid-tiny", **sizes)).eval()


def by_hflm(model, tokenizer, tasks, names):
    index = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    results = evaluate(lm, index.load(names), bootstrap_iters=10)["results"]
    return {(task, key.split(",")[0]): value for task, row in results.items() for key, value in row.items()}


def teacher():
    if (STORIES / "stories260k").is_dir():
        return load_model(STORIES / "stories260k")
    return new_teacher("llama", vocab_size=258, max_position_embeddings=512).eval(), byte_tokenizer()


@pytest.mark.parametrize("load", [lambda: (zoo(), byte_tokenizer()), teacher], ids=["zoo", "llama"])
def test_results_are_those_of_hflm(tasks, load, capfd):
    model, tokenizer = load()
    capfd.readouterr()
    names = ["own_choice", "own_rolling", "own_writing"]
    report = harness(model, tokenizer, names, include_path=tasks, batch_size=4)
    assert capfd.readouterr() == ("", "")  # lm-eval likes to talk
    expected = by_hflm(model, tokenizer, tasks, names)
    measured = {(row.task, row.metric): row for row in report.measured}
    assert {key[1] for key in measured} == {"acc", "acc_norm", "word_perplexity", "bits_per_byte", "exact_match"}
    for (task, metric), row in measured.items():
        assert row.value == pytest.approx(expected[task, metric], rel=1e-5), metric
        assert row.documents == 12
        if metric.startswith("acc"):
            assert row.stderr == pytest.approx(expected[task, f"{metric}_stderr"])
    assert report.tokens_read < 0.5 * report.tokens


def test_limit_and_examples_before_the_question(tasks):
    model, tokenizer = zoo(), byte_tokenizer()
    plain = harness(model, tokenizer, ["own_choice"], include_path=tasks, limit=3)
    shots = harness(model, tokenizer, ["own_choice"], include_path=tasks, limit=3, num_fewshot=2)
    twice = harness(model, tokenizer, ["own_choice"], include_path=tasks, limit=3, read_twice=True)
    assert {row.documents for report in (plain, shots, twice) for row in report.measured} == {3}
    assert shots.tokens > 2 * plain.tokens
    assert 1.5 * plain.tokens < twice.tokens < 2.1 * plain.tokens


def test_evaluating_leaves_the_global_generators_alone(tasks):
    model = zoo()  # seeds the generator itself
    torch.rand(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    harness(model, byte_tokenizer(), ["own_writing"], include_path=tasks, limit=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def test_command_prints_a_line_per_metric_and_writes_json(tasks, saved, tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["eval", "harness", saved, "--tasks", "own_group,own_writing", "--include-path", tasks, "--json", out]
    assert main([*map(str, command), "--limit", "4", "--max-length", "60"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    result = json.loads(out.read_text())
    assert [line.split()[:2] for line in printed.splitlines()[:5]] == [
        [row["task"], row["metric"]] for row in result["measured"]
    ]
    assert result["limit"] == 4
    assert result["tasks"] == ["own_group", "own_writing"]
    assert {row["task"] for row in result["measured"]} == {"own_choice", "own_rolling", "own_writing"}
    assert result["texts_cut"] > 0
    assert "texts cut on the left to 60 tokens" in printed


def test_the_task_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    config["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(config))
    row = {"question": "The capital of France is", "choices": ["Rome", "Paris"], "label": 1}
    (tmp_path / "capitals.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    report = harness(zoo(), byte_tokenizer(), ["capitals"], include_path=".")
    assert [row.metric for row in report.measured] == ["acc", "acc_norm"]


def test_the_recall_suite_names_its_data():
    index = TaskManager(include_path=str(OWN), include_defaults=False)
    assert index.task_index["recall"].cfg["task"] == list(RECALL)
    for name, path in RECALL.items():
        config = index.task_index[name].cfg
        assert config["dataset_path"] == path
        assert config["generation_kwargs"]["max_gen_toks"] == 48


def test_recall_runs_on_local_rows_of_the_same_columns(tmp_path, monkeypatch):
    form = [{"doc_id": "0", "key": "name", "value": " Ada ", "text": "\nname: Ada\nborn: 1815\nname: "}] * 2
    asked = [{"context": "[PAR] Ada was born. She was", "question": "She was", "answers": ["born", "Ada"]}]
    for name, rows in (("swde", form), ("nq", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"validation": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        own = {"include": str(OWN / f"recall_{name}.yaml"), "task": f"my_{name}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own | {"dataset_path": "json", "dataset_kwargs": data}))
    model, seen = zoo(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **options: seen.append(ids) or generate(ids, **options))
    report = harness(model, byte_tokenizer(), ["my_swde", "my_nq"], include_path=tmp_path)
    assert [(row.task, row.metric) for row in report.measured] == [("my_swde", "contains"), ("my_nq", "contains")]
    assert [row.documents for row in report.measured] == [2, 1]
    prompts = {byte_tokenizer().decode(row, skip_special_tokens=True) for ids in seen for row in ids}
    assert prompts == {"name: Ada\nborn: 1815\nname:", "Ada was born. She was"}


def test_contains_is_blind_to_case_and_takes_any_answer():
    assert recall.contains("it is ADA Lovelace", ["x", "ada"]) == 1
    assert recall.contains("it is Ad a", ["ada"]) == 0
    assert recall.contains("anything", []) == 0
    assert recall.contains_value({"value": " Ada\n"}, ["said ada."]) == {"contains": 1}
    assert recall.contains_answer({"answers": ["1815", "Ada"]}, ["in 1815"]) == {"contains": 1}
    assert recall.first_answer({"answers": ["a", "b"]}) == "a"
    assert recall.first_answer({"answers": []}) == "unanswerable"
    doc = {"context": "[DOC] [TLE] Ada. [PAR] A poet's child. Whose child?whose child?", "question": "Whose child?"}
    assert recall.document_and_question(doc) == "Ada.  A poet's child. Whose child?"


@pytest.fixture
def refused(capsys, tmp_path, saved, few_defaults):
    """Runs the command, which must refuse, writing nothing; returns its one line."""

    def run(*arguments: object, model=saved) -> str:
        out = tmp_path / "out.json"
        assert main(["eval", "harness", str(model), "--json", str(out), *map(str, arguments)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        assert errors.startswith("lm-zoo: error: ")
        assert errors.count("\n") == 1, errors
        assert not out.exists()
        return errors

    return run


def test_a_task_that_does_not_exist_names_the_nearest(refused, tasks):
    assert "no task 'arc_eazy'; the nearest are arc_easy" in refused("--tasks", "arc_eazy")
    line = refused("--tasks", "own_choice,own_rollin", "--include-path", tasks)
    assert "no task 'own_rollin'; the nearest are own_rolling" in line
    assert "no task 'recal'; the nearest are recall" in refused("--tasks", "recal")
    assert "--tasks names no task" in refused("--tasks", " , ")


def test_a_folder_or_file_that_cannot_be_read_is_named(refused, tmp_path, tasks):
    assert "nowhere is not a folder" in refused("--tasks", "x", "--include-path", tmp_path / "nowhere")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "holds no task files" in refused("--tasks", "x", "--include-path", folder)
    (folder / "broken.yaml").write_text("task: mine\n  doc: [")
    line = refused("--tasks", "mine", "--include-path", folder)
    assert "no task 'mine'" in line
    assert f"; {folder / 'broken.yaml'} cannot be read (" in line
    (folder / "broken.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n")
    assert "the data of task 'mine' is neither here nor to be fetched" in refused(
        "--tasks", "mine", "--include-path", folder
    )


def test_a_folder_that_may_not_be_read_is_named(refused, tasks, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tasks and access(path, mode))
    assert f"include_path {tasks} cannot be read" in refused("--tasks", "own_choice", "--include-path", tasks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metric_list: [{metric: ac}]", "task 'own_choice': no metric 'ac'; the nearest are acc"),
        ("metric_list: [acc]", "task 'own_choice': metric_list holds 'acc'; write it as {metric: acc}"),
        ("metric_list: [{metric: acc, aggregation: meen}]", "no aggregation 'meen'; the nearest are mean"),
        ("doc_to_choice: nothing", "task 'own_group' cannot be set up: "),
    ],
)
def test_a_task_file_that_cannot_work_says_why(refused, tmp_path, change, message):
    (tmp_path / "tasks").mkdir()
    broken = yaml.safe_dump(yaml.safe_load(CHOICE) | yaml.safe_load(change))
    folder = write_tasks(tmp_path / "tasks", choice=broken, group="group: own_group\ntask: [own_choice]\n")
    assert message in refused("--tasks", "own_group", "--include-path", folder)


def test_more_examples_than_there_are_is_one_line(refused, tasks):
    line = refused("--tasks", "own_choice", "--include-path", tasks, "--num-fewshot", "12")
    assert "num_fewshot 12 is too many for task 'own_choice'" in line


def test_data_out_of_reach_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "the data of task 'recall_swde' is neither here nor to be fetched" in refused("--tasks", "recall_swde")


def test_the_hubs_retries_are_not_told(refused, monkeypatch):
    log = logging.getLogger("huggingface_hub.utils._http")
    told = []

    def load(*arguments, **options):
        told.append(log.isEnabledFor(logging.WARNING))
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "nor to be fetched: no way there; fetch it once" in refused("--tasks", "recall_fda")
    assert told == [False]
    assert log.isEnabledFor(logging.WARNING)


def test_rolling_texts_cannot_be_read_twice(refused, tasks):
    line = refused("--tasks", "own_rolling", "--include-path", tasks, "--read-twice")
    assert "read_twice is about contexts" in line


def test_a_model_without_its_tokenizer_is_refused(refused, saved, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    assert "has no tokenizer" in refused("--tasks", "own_choice", model=folder)


def test_without_lm_eval_it_says_how_to_get_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    assert 'pip install "lm_zoo[eval]"' in refused("--tasks", "own_choice")
