"""What a run tells about its layers and writes at each validation."""

import csv
import math

import pytest
import torch
from interrupted_runs import Crash, CrashAt

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.eval.layer_statistics import layer_statistics
from lm_zoo.layers import MIXERS, S4D
from lm_zoo.train import Checkpoints
from lm_zoo.train.layer_statistics import LONGEST
from lm_zoo.train.metrics import read_metrics

OPTIONS = {"mamba2": {"head_size": 32}, "hgrn": {}, "mamba": {}, "s4d": {}}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_statistics(name) -> None:
    """Of two layers; the state's norm against the cache, and the mean decay between 0 and 1."""
    torch.manual_seed(0)
    mixers = {"it": {"type": name, **OPTIONS.get(name, {"num_heads": 2})}}
    sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    model = ZooForCausalLM(ZooConfig(mixers=mixers, **sizes)).eval()
    tokens = torch.randint(32, (1, 70), generator=torch.Generator().manual_seed(0))
    layers = layer_statistics(model, tokens)
    if name == "attention":
        assert layers == []
        return
    cache = model.init_cache(1)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer, state in zip(layers, cache.states, strict=True):
        assert layer["mixer"] == MIXERS[name].__name__
        assert layer["state_norm"] == pytest.approx(state["S" if "S" in state else "h"].norm().item(), rel=1e-5)
        if MIXERS[name].decay in ("none", "none, or per token"):
            assert (layer["mean_decay"], layer["memory_length"]) == (1.0, math.inf)
        else:
            assert 0 < layer["mean_decay"] < 1
            assert 1 < layer["memory_length"] < math.inf


def test_the_numbers_of_known_decays() -> None:
    """RetNet's are 1 - 2^(-5 - h); S4D's follow from its parameters; a selective scan's from a constant step."""
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}

    def of(name, **options):
        torch.manual_seed(0)
        model = ZooForCausalLM(ZooConfig(mixers={name: options}, **sizes)).eval()
        return model, lambda: layer_statistics(model, tokens)[0]

    _, retnet = of("retnet", num_heads=3, expand_k=1.5, expand_v=1.5)
    assert retnet()["mean_decay"] == pytest.approx(1 - (2**-5 + 2**-6 + 2**-7) / 3, rel=1e-6)
    assert retnet()["memory_length"] == pytest.approx(64, rel=1e-4)
    model, s4d = of("s4d", state_size=2)
    layer = next(part for part in model.modules() if isinstance(part, S4D))
    decays = (-layer.A_log.exp() * layer.log_dt.exp()[:, None]).exp()
    assert s4d()["mean_decay"] == pytest.approx(decays.mean().item(), rel=1e-5)
    model, mamba = of("mamba", state_size=2)
    layer = model.model.layers[0].mixer
    with torch.no_grad():
        layer.dt_proj.weight.zero_()
        layer.dt_proj.bias.fill_(math.log(math.expm1(0.1)))
    expected = (math.exp(-0.1) + math.exp(-0.2)) / 2  # A = -1, -2
    assert mamba()["mean_decay"] == pytest.approx(expected, rel=1e-5)


def test_a_run_writes_them_once_also_when_it_is_resumed(start_run, tmp_path) -> None:
    options = {"max_steps": 4, "val_check_interval": 1, "limit_val_batches": 1}
    data = {"val_fraction": 0.1, "seq_len": 32}
    start_run("whole", data=data, **options)
    with pytest.raises(Crash):
        start_run("parts", data=data, checkpoints=Checkpoints(every_n_steps=2), callbacks=[CrashAt(4)], **options)
    start_run("parts", data=data, resume="last", **options)
    start_run("parts", data=data, resume=tmp_path / "parts" / "checkpoints" / "step-00000003", **options)
    for name in ("layers.csv", "samples.txt"):
        text = (tmp_path / "parts" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "whole" / name).read_text(encoding="utf-8")
    with (tmp_path / "whole" / "layers.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["layer"], line["mixer"]) for line in lines] == [
        (step, "0", "GatedLinearAttention") for step in "1234"
    ]
    assert all(0.9 < float(line["mean_decay"]) < 1 for line in lines)
    assert text.count("--- step ") == 4
    assert LONGEST >= 1024
    last = read_metrics(tmp_path / "whole" / "metrics.csv")[-1]
    assert float(last["val_perplexity"]) == pytest.approx(math.exp(float(last["val_loss"])), rel=1e-4)


def test_speed_memory_and_utilisation_are_plausible(start_run, tmp_path) -> None:
    trainer, _ = start_run("run", max_steps=3)
    line = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert 0 < float(line["flops_utilisation"]) < 1
    assert 0.05 < float(line["memory_gb"]) < 100
    nats = float(line["train_loss"])
    tokens_per_byte = trainer.datamodule.train_rows.selection.tokens_per_byte
    assert float(line["train_bits_per_byte"]) == pytest.approx(nats / math.log(2) * tokens_per_byte)
