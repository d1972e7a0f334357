"""What `lm-zoo eval inspect` says of a model is what the model does, and its pictures are written."""

import json
import math

import pytest
import torch
from compare import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.cli import main
from lm_zoo.eval.inspect_layers import attention_maps
from lm_zoo.eval.lengths import measure_lengths
from lm_zoo.layers import MIXERS
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.train.tokenizers import byte_tokenizer

VOCABULARY = len(byte_tokenizer())
PICTURES = ("attention.png", "memory.png", "positions.png", "lengths.png")
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. " * 3


def zoo(mixers: dict, layers: int = 3) -> ZooForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": layers, "initializer_range": 0.3}
    return ZooForCausalLM(ZooConfig(mixers=mixers, **sizes)).eval()


def llama(positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=positions, **sizes)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


MIXED = {"retnet": {"num_heads": 2}, "linear_attention": {"num_heads": 2}, "attention": {"num_heads": 2, "window": 3}}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("build", [lambda: zoo(MIXED), lambda: llama(512)], ids=["zoo", "llama"])
def test_loss_by_length_and_by_position_is_that_of_the_logits(build):
    """The same tokens at every length; all of 16 lengths by position; against one forward pass per text."""
    model = build()
    ids = torch.randint(VOCABULARY, (150,), generator=torch.Generator().manual_seed(1))
    measured = measure_lengths(model, ids, 8, spans=3)
    ends = [128, 139, 150]

    def nats(start: int, end: int) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:end]).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, ids[start + 1 : end], reduction="none")

    assert [n for n, _ in measured.by_length] == [8, 16, 32, 64, 128]
    assert measured.scored == 12
    for n, loss in measured.by_length:
        assert loss == pytest.approx(torch.cat([nats(end - n, end)[-4:] for end in ends]).mean().item(), rel=1e-5)
    by_token = torch.stack([nats(end - 128, end) for end in ends]).mean(dim=0)
    bins = measured.by_position
    assert [bins[0][0], *(last + 1 for _, last, _ in bins)] == [*(first for first, _, _ in bins), 128]  # no gaps
    for first, last, loss in bins:
        assert loss == pytest.approx(by_token[first - 1 : last].mean().item(), rel=1e-5)


def test_positions_limit_the_lengths():
    measured = measure_lengths(llama(32), torch.zeros(64, dtype=torch.int64), 8)
    assert ([n for n, _ in measured.by_length], measured.limit) == ([8, 16, 32], 32)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_a_map_of_shares(name):
    options = {"mamba2": {"head_size": 8, "state_size": 4}, "hgrn": {}, "mamba": {}, "s4d": {}}.get(
        name, {"num_heads": 2}
    )
    maps = attention_maps(zoo({name: options}, layers=2), torch.arange(12)[None])
    for layer, seen in enumerate(maps):
        assert (seen.layer, seen.mixer) == (layer, MIXERS[name].__name__)
        assert_close(seen.mean.sum(dim=-1), torch.ones(12), 1e-5)
        assert seen.unit == ("channel" if name in ("hgrn", "mamba", "s4d") else "head")
        assert len(seen.distance) == (2 if seen.unit == "head" else 32 if name == "mamba" else 16) or name == "mamba2"
        nearest, *_, farthest = seen.heads
        assert seen.distance[nearest] == seen.distance.min()
        assert seen.distance[farthest] == seen.distance.max()


def test_a_transformer_shows_its_own_attention():
    model, ids = llama(), torch.arange(20)[None]
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    maps = attention_maps(model, ids)
    assert model.config._attn_implementation == "sdpa"
    for seen, weights in zip(maps, expected, strict=True):
        assert_close(seen.mean, weights[0].mean(dim=0), 1e-5)
    # With a window as long as the text the hybrid mixer is that attention, and so is a layer that keeps its softmax.
    student = LinearizedForCausalLM.from_teacher(llama(), "hybrid", {"window": 20}, keep_layers=[1])
    for seen, weights, name in zip(attention_maps(student, ids), expected, ("HybridAttention", "softmax"), strict=True):
        assert seen.mixer == name
        assert_close(seen.mean, weights[0].mean(dim=0), 1e-5)


def test_how_far_a_layer_looks_and_remembers(tmp_path, text):
    """Known cases: RetNet's constant decays, a memory without end, a window that no token looks beyond."""
    folder = save(zoo(MIXED), tmp_path / "model")
    arguments = ["eval", "inspect", folder, "--text", text, "--out", tmp_path / "out", "--length", 16, "--tokens", 24]
    assert main([str(argument) for argument in arguments]) == 0
    content = json.loads((tmp_path / "out" / "inspect.json").read_text())
    retnet, linear, window = content["layers"]
    assert retnet["decay_quantiles"] == pytest.approx([1 - 2**-5 + q * 2**-6 for q in (0.05, 0.25, 0.5, 0.75, 0.95)])
    assert retnet["memory_length"] == pytest.approx(64, rel=1e-4)
    assert (linear["memory_length"], linear["memory_quantiles"]) == (None, [None] * 5)
    assert 0 < window["nearest_head"] <= window["attention_distance"] <= window["farthest_head"] < 2
    assert "memory_length" not in window
    assert [point["tokens"] for point in content["by_length"]] == [16, 32, 64, 128, 256]
    for point in content["by_length"]:
        assert point["perplexity"] == pytest.approx(math.exp(point["nats"]))
    for picture in PICTURES:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_a_position_limit_is_one_line(tmp_path, text, capsys):
    folder = save(llama(64), tmp_path / "model")
    (tmp_path / "config.yaml").write_text("data: {seq_len: 32}\n")  # the recipe of the run that the model lies in
    assert (
        main(["eval", "inspect", str(folder), "--text", str(text), "--out", str(tmp_path / "out"), "--tokens", "9"])
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if "left out" in line] == [
        "lengths above 64 tokens are left out: the model has 64 positions"
    ]
    assert sum(line.startswith("perplexity in") for line in out) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "16", "--layers", "0,3"], "layers must be from 0 to 2, got 3"),
        (["--length", "16", "--layers", "first"], "'first' is not numbers of layers"),
        (["--length", "16", "--tokens", "1000"], "tokens must be from 2 to"),
        (["--length", "40"], "tokens, and 640 are read at once: give a longer text or a smaller length"),
        (["--length", "1"], "length must be at least 2"),
        ([], "says how long its training texts were; give --length"),
    ],
)
def test_bad_input_is_one_line(tmp_path, text, capsys, options, message):
    folder = save(zoo(MIXED), tmp_path / "model")
    command = ["eval", "inspect", str(folder), "--text", str(text), "--out", str(tmp_path / "out"), *options]
    capsys.readouterr()  # what saving drew
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_length_beyond_the_positions_is_one_line(tmp_path, text, capsys):
    folder = save(llama(64), tmp_path / "model")
    command = ["eval", "inspect", str(folder), "--text", str(text), "--out", str(tmp_path / "out"), "--length", "65"]
    assert main(command) == 2
    assert "length 65 exceeds the model's 64 positions; choose at most 64" in capsys.readouterr().err
