"""What a run leaves behind: a model that loads, numbers that are right, a picture."""

import math
import os
import pty

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_zoo.train.run
from lm_zoo import ZooForCausalLM
from lm_zoo.errors import UserError
from lm_zoo.train.metrics import read_metrics
from lm_zoo.train.plots import plot_losses

VALIDATED = {"val_fraction": 0.1, "seq_len": 32}


def test_the_final_folder_loads_and_scores_as_the_log_says(start_run, tmp_path) -> None:
    trainer, module = start_run("run", max_steps=4, data=VALIDATED)
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, ZooForCausalLM)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert model.config.vocab_size == 320  # 258, rounded up to a multiple of 64
    for name, weight in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    rows = trainer.datamodule.val_rows
    held_out = trainer.datamodule.val_rows.selection
    nats = targets = 0
    for i in range(len(rows)):
        tokens = torch.from_numpy(rows[i][0])[None]
        nats += model(tokens, labels=tokens).loss.item() * 31
        targets += 31
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert float(last["val_loss"]) == pytest.approx(nats / targets, rel=1e-5)
    bits = nats / targets / math.log(2) * held_out.num_tokens / held_out.num_bytes.sum()
    assert float(last["val_bits_per_byte"]) == pytest.approx(bits, rel=1e-5)
    text = tokenizer.decode(model.generate(**tokenizer("the state", return_tensors="pt"), max_new_tokens=3)[0])
    assert text.startswith("the state")


def test_the_folder_of_a_run(start_run, tmp_path) -> None:
    start_run("run", max_steps=4, val_check_interval=2, data=VALIDATED)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints", "layers.csv", "learning_rate.png", "loss.png", "metrics.csv", "model", "samples.txt",
        "tensorboard",
    }  # fmt: skip
    for picture in ("loss.png", "learning_rate.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    assert any(path.name.startswith("events") for path in (tmp_path / "run" / "tensorboard").iterdir())
    validated = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.csv") if line["val_loss"]]
    assert validated == ["2", "4"]  # the last step once, though an interval ends there too


@pytest.mark.parametrize(("interval", "steps"), [(4, "246"), (1, "123456")])
def test_validations_stand_at_step_borders(start_run, tmp_path, interval, steps) -> None:
    """The interval counts batches; with three of them to a step it is rounded up to whole steps."""
    options = {"val_check_interval": interval, "limit_val_batches": 1, "data": VALIDATED}
    start_run("run", max_steps=6, accumulate_grad_batches=3, **options)
    lines = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [line["step"] for line in lines if line["val_loss"]] == list(steps)


def test_the_logged_loss_is_the_mean_over_tokens(start_run, tmp_path) -> None:
    """Also over micro-batches with different numbers of documents."""
    losses = []

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            loss = module(batch).item()
            losses.append((loss, batch["num_targets"]))

    start_run(
        "run", max_steps=6, accumulate_grad_batches=2, log_every_n_steps=3, callbacks=[Collect()],
        data={"separator": "\n", "batch_size": 3}, model={"learning_rate": 1e-30, "weight_decay": 0.0},
    )  # fmt: skip
    assert len({count for _, count in losses}) > 1
    lines = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [line["step"] for line in lines] == ["3", "6"]
    assert [line["tokens"] for line in lines] == [str(3 * 2 * 48), str(6 * 2 * 48)]
    for line, part in zip(lines, (losses[:6], losses[6:]), strict=True):
        mean = sum(loss * count for loss, count in part) / sum(count for _, count in part)
        assert float(line["train_loss"]) == pytest.approx(mean, rel=1e-5)


def test_training_learns(start_run, tmp_path) -> None:
    start_run("run", max_steps=80, log_every_n_steps=20, model={"learning_rate": 0.02}, data={"batch_size": 8})
    losses = [float(line["train_loss"]) for line in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert losses[-1] < 0.75 * losses[0]


def test_epochs_count_the_steps(start_run, tmp_path) -> None:
    data = {"max_tokens": 16 * 2 * 10, "epochs": 1.5}
    trainer, _ = start_run("run", data=data, accumulate_grad_batches=2)
    assert trainer.global_step == 7  # 15 batches are 7 steps of two
    with pytest.raises(UserError, match=r"data\.epochs and trainer\.max_steps both say how long to train"):
        start_run("other", data=data, max_steps=3)
    with pytest.raises(UserError, match=r"trainer\.max_epochs=3 is not used here; give data\.epochs instead"):
        start_run("other", max_epochs=3)
    with pytest.raises(UserError, match="less than one step of 400 rows"):
        start_run("other", data={"max_tokens": 16 * 50}, accumulate_grad_batches=200)


def test_a_finished_run_can_be_continued(start_run, tmp_path) -> None:
    options = {
        "model": {"schedule": "constant", "warmup": 0}, "accumulate_grad_batches": 2, "data": VALIDATED,
        "val_check_interval": 4, "limit_val_batches": 2,
    }  # fmt: skip
    _, whole = start_run("whole", max_steps=6, **options)
    start_run("parts", max_steps=3, **options)
    _, continued = start_run("parts", max_steps=6, resume="last", **options)
    assert torch.equal(continued.model.lm_head.weight, whole.model.lm_head.weight)
    start_run("parts", max_steps=6, resume="last", **options)  # nothing left to do: exports again
    validated = [line["step"] for line in read_metrics(tmp_path / "parts" / "metrics.csv") if line["val_loss"]]
    assert validated == list("2346")


@pytest.mark.parametrize("respect_documents", [True, False])
def test_bf16_and_recomputation(start_run, tmp_path, respect_documents) -> None:
    data = {"respect_documents": respect_documents}
    _, plain = start_run("plain", max_steps=2, data=data)
    _, recomputed = start_run("recomputed", max_steps=2, data=data, model={"gradient_checkpointing": True})
    assert torch.equal(plain.model.lm_head.weight, recomputed.model.lm_head.weight)
    start_run("bf16", max_steps=2, precision="bf16-mixed", data=data)
    losses = [float(read_metrics(tmp_path / run / "metrics.csv")[-1]["train_loss"]) for run in ("plain", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("mixer", ["gla", "attention"])  # one refuses NaN itself, on a CPU
def test_a_loss_that_is_not_finite_stops_the_run(start_run, tiny, mixer) -> None:
    model = {"config": {**tiny, "mixers": {mixer: {"num_heads": 1}}}, "learning_rate": 1e18, "warmup": 0}
    with pytest.raises(UserError, match=r"20 steps in a row were skipped by step 21\. Of .*, 20 had a loss"):
        start_run("run", max_steps=50, model=model, gradient_clip_val=None, data=VALIDATED, val_check_interval=5)


def test_a_tokenizer_larger_than_the_model_is_refused(start_run, tmp_path, tiny) -> None:
    with pytest.raises(UserError, match="the tokenizer has 258 tokens, more than the model's vocab_size=200"):
        start_run("run", max_steps=2, model={"config": {**tiny, "vocab_size": 200}})
    assert not (tmp_path / "run").exists()


def test_too_little_text_is_refused(start_run, tmp_path) -> None:
    for data, message in [
        ({"seq_len": 100_000}, r"has 30,721 tokens, less than one row of data.seq_len=100000; give more"),
        ({"batch_size": 10_000}, "less than one batch of 10000 rows of data.seq_len=16"),
        (
            {"val_fraction": 0.1, "seq_len": 10_000},
            r"held out by data.val_fraction=0.1 has \d,\d\d\d tokens, less than",
        ),
        ({"val_fraction": 1.0}, "give a fraction from 0 to below 1"),
        ({"val_split": "test"}, r"data\.val_split needs data\.dataset"),
        ({"num_workers": -1}, r"data\.num_workers=-1 is not possible; give at least 0"),
    ]:
        with pytest.raises(UserError, match=message):
            start_run("run", max_steps=2, data=data)
    assert not (tmp_path / "run").exists()


def test_the_bar_on_a_terminal(start_run, monkeypatch) -> None:
    """In a terminal a Rich bar shows steps and numbers; elsewhere there is a line per log."""
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        start_run("run", max_steps=4, enable_progress_bar=True, data=VALIDATED, val_check_interval=2)
        shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "4/4" in shown
    assert "tokens/s" in shown
    assert "bits per byte" in shown


def test_one_picture_of_several_runs(start_run, tmp_path) -> None:
    for name in ("one", "two"):
        start_run(name, max_steps=2, data=VALIDATED)
    plot_losses({name: tmp_path / name / "metrics.csv" for name in ("one", "two")}, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert lm_zoo.train.run.__doc__.count("fit(") == 1
