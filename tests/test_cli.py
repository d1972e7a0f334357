"""The command line: what works, and one clear line for what cannot."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from safetensors.torch import load_file

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.cli import main
from lm_zoo.train.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny model and its byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = ZooConfig.preset("hybrid-tiny", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    ZooForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy to break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the wörst of times. " * 8)
    return path


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused, writing nothing; returns its one line."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lm-zoo: error: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


class TestPerplexity:
    def test_reports_and_writes_json(self, saved, text, tmp_path, capsys):
        out = tmp_path / "result.json"
        command = ["eval", "perplexity", str(saved), "--text", str(text), "--json", str(out), "--context", "64"]
        assert main(command) == 0
        printed, err = capsys.readouterr()
        result = json.loads(out.read_text())
        assert f"{result['perplexity']:.4f}" in printed
        assert result["context"] == 64
        assert result["bytes"] == text.stat().st_size
        assert err == ""

    def test_refuses_a_missing_text(self, saved, refused):
        assert "no text file nowhere.txt" in refused("eval", "perplexity", saved, "--text", "nowhere.txt")

    @pytest.mark.parametrize("content", [b"", b" \n\n"])
    def test_refuses_an_empty_text(self, saved, text, refused, content):
        text.write_bytes(content)
        assert "holds no text" in refused("eval", "perplexity", saved, "--text", text)

    def test_refuses_a_text_of_one_token(self, saved, text, refused):
        text.write_text("a")
        assert "at least 2" in refused("eval", "perplexity", saved, "--text", text)

    def test_refuses_bytes_that_are_no_text(self, saved, text, refused):
        text.write_bytes(b"good \xff bad")
        assert "not UTF-8 text (byte 5)" in refused("eval", "perplexity", saved, "--text", text)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--context", "1"], "context must be at least 2"),
            (["--context", "8", "--stride", "8"], "stride must be from 1 to"),
            (["--context", "-3"], "'-3' is not a whole number"),
            (["--stride", "many"], "'many' is not a whole number"),
        ],
    )
    def test_refuses_impossible_windows(self, saved, text, refused, options, expected):
        assert expected in refused("eval", "perplexity", saved, "--text", text, *options)

    def test_refuses_an_output_without_a_folder(self, saved, text, tmp_path, refused):
        out = tmp_path / "none" / "out.json"
        assert "folder to write into does not exist" in refused(
            "eval", "perplexity", saved, "--text", text, "--json", out
        )


class TestModelFolder:
    """Whatever is wrong with MODEL."""

    def refuse(self, refused, folder: Path) -> str:
        return refused("generate", folder, "--prompt", "a")

    def test_missing(self, refused, tmp_path):
        assert "no model folder" in self.refuse(refused, tmp_path / "nothing")

    def test_without_config(self, refused, model):
        (model / "config.json").unlink()
        assert "has no config.json" in self.refuse(refused, model)

    def test_config_is_not_json(self, refused, model):
        (model / "config.json").write_text('{"model_type": ')
        assert "is not JSON" in self.refuse(refused, model)

    def test_config_of_an_unknown_kind(self, refused, model):
        (model / "config.json").write_text('{"model_type": "nobody_knows_this"}')
        assert "nobody_knows_this" in self.refuse(refused, model)

    def test_config_with_an_unknown_mixer(self, refused, model):
        config = json.loads((model / "config.json").read_text())
        config["pattern"] = ["gated"]
        (model / "config.json").write_text(json.dumps(config))
        assert "pattern" in self.refuse(refused, model)

    def test_without_weights(self, refused, model):
        (model / "model.safetensors").unlink()
        assert "has no weights" in self.refuse(refused, model)

    @pytest.mark.parametrize("kept", [0, 100, -1000])
    def test_truncated_weights(self, refused, model, kept):
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        assert f"{weights} is cut off or damaged" in self.refuse(refused, model)

    def test_weights_of_another_size(self, refused, model):
        config = json.loads((model / "config.json").read_text())
        config["hidden_size"] = 64
        (model / "config.json").write_text(json.dumps(config))
        assert str(model) in self.refuse(refused, model)

    def test_weights_that_lack_some(self, refused, model):
        config = json.loads((model / "config.json").read_text())
        config["num_hidden_layers"] = 4
        (model / "config.json").write_text(json.dumps(config))
        assert "lacks" in self.refuse(refused, model)

    def test_without_tokenizer(self, refused, model):
        (model / "tokenizer.json").unlink()
        (model / "tokenizer_config.json").unlink()
        assert "has no tokenizer" in self.refuse(refused, model)

    def test_broken_tokenizer(self, refused, model):
        (model / "tokenizer.json").write_text("{}")
        assert "cannot load the tokenizer" in self.refuse(refused, model)

    def test_tokenizer_larger_than_the_vocabulary(self, refused, model):
        ZooForCausalLM(ZooConfig.preset("gla-tiny", vocab_size=50)).save_pretrained(model)
        assert "258 tokens and the model's vocabulary 50" in self.refuse(refused, model)


class TestGenerate:
    def test_greedy_continuation_is_the_models(self, saved, capsys):
        assert main(["generate", str(saved), "--prompt", "ab", "--temperature", "0", "--max-tokens", "5"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("ab")
        assert out.endswith("\n")
        assert err == ""

    def test_seed_decides(self, saved, capsys):
        outputs = []
        for seed in (1, 1, 2):
            assert main(["generate", str(saved), "--prompt", "ab", "--seed", str(seed), "--max-tokens", "20"]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1] != outputs[2]

    def test_prompt_from_standard_input(self, saved, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüße".encode())))
        assert main(["generate", str(saved), "--prompt", "-", "--max-tokens", "1"]) == 0
        assert capsys.readouterr().out.startswith("grüße")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--temperature", "-1"], "'-1' is not a number of at least 0"),
            (["--temperature", "nan"], "'nan' is not a number"),
            (["--top-p", "0"], "not a probability"),
            (["--max-tokens", "0"], "not a whole number of at least 1"),
            (["--beams", "4"], "unrecognized arguments: --beams 4"),
        ],
    )
    def test_refuses_impossible_options(self, saved, refused, options, expected):
        assert expected in refused("generate", saved, "--prompt", "a", *options)

    def run(self, saved, *options):
        assert main(["generate", str(saved), "--temperature", "0", *map(str, options)]) == 0

    def test_a_session_goes_on(self, saved, tmp_path, capsys):
        """Two runs of 6 tokens write what one of 12 does; the third adds to the text."""
        state = tmp_path / "state"
        self.run(saved, "--prompt", "ab", "--max-tokens", 12, "--state", tmp_path / "whole")
        whole = capsys.readouterr().out
        self.run(saved, "--prompt", "ab", "--max-tokens", 6, "--state", state)
        out, err = capsys.readouterr()
        assert err == f"lm-zoo: {state} is new: the text began here\n"
        self.run(saved, "--max-tokens", 6, "--state", state)
        more, err = capsys.readouterr()
        assert err == ""
        assert out.rstrip("\n") + more == whole
        found, expected = load_file(state), load_file(tmp_path / "whole")
        assert found.keys() == expected.keys()
        for name in expected:  # a recorded step rounds otherwise than the plain ones that each run begins with
            if expected[name].is_floating_point():
                assert_close(found[name], expected[name], 1e-6)
            else:
                assert torch.equal(found[name], expected[name])
        self.run(saved, "--prompt", "cd", "--max-tokens", 6, "--state", state)
        assert capsys.readouterr().out.startswith("cd")

    @pytest.mark.parametrize("way", ["--draft", "--lookup", "--early-layers"])
    def test_guesses_do_not_change_the_text(self, saved, tmp_path, capsys, way):
        guesses = way, saved if way == "--draft" else 1
        self.run(saved, "--prompt", "ab", "--max-tokens", 12)
        whole = capsys.readouterr().out
        self.run(saved, "--prompt", "ab", "--max-tokens", 6, "--state", tmp_path / "state", *guesses)
        out = capsys.readouterr().out
        self.run(saved, "--max-tokens", 6, "--state", tmp_path / "state", *guesses)
        assert out.rstrip("\n") + capsys.readouterr().out == whole

    def test_refuses_a_draft_with_another_tokenizer(self, saved, model, refused):
        tokenizer = (model / "tokenizer.json").read_text()
        swapped = tokenizer.replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
        assert swapped != tokenizer
        (model / "tokenizer.json").write_text(swapped)
        message = refused("generate", saved, "--prompt", "a", "--draft", model)
        assert f"the draft in {model} has another tokenizer than the model in {saved}" in message

    def test_refuses_a_session_without_a_text(self, saved, tmp_path, refused):
        assert "give --prompt TEXT" in refused("generate", saved)
        assert "give --prompt TEXT" in refused("generate", saved, "--state", tmp_path / "absent")

    def test_refuses_a_state_that_is_none(self, saved, model, tmp_path, refused):
        state = tmp_path / "state"
        self.run(saved, "--prompt", "ab", "--max-tokens", 2, "--state", state)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"norm_eps": 0.1}))
        command = ("--prompt", "a", "--state", state)
        assert "state of another model" in refused("generate", model, *command)
        state.write_bytes(state.read_bytes()[:-1])
        assert "no state file, or cut short" in refused("generate", saved, *command)

    def test_refuses_a_prompt_that_encodes_to_nothing(self, model, tmp_path, refused):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (model / name).exists():
                kept = {k: v for k, v in json.loads((model / name).read_text()).items() if not k.endswith("_token")}
                (model / name).write_text(json.dumps(kept))
        assert "the tokenizer has no start token" in refused("generate", model, "--prompt", "")
        assert "no start token" in refused("generate", model, "--prompt", "", "--state", tmp_path / "state")


class TestList:
    def test_is_plain_in_a_pipe(self, capsys):
        assert main(["list", "--hidden-size", "64"]) == 0
        header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert header[:2] == ["name", "class"]
        facts = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        assert facts["gla"]["decay"] == "per key channel"
        # 4 heads of K = 8 and V = 16 in float32; keys and values of 64 channels each
        assert facts["gla"]["state"] == f"{4 * 8 * 16 * 4:,} B"
        assert facts["attention"]["state"] == f"{2 * 64 * 4:,} B per token"
        assert facts["attention"]["parameters"] == str(4 * 64 * 64)

    def test_refuses_a_size_that_no_mixer_has(self, refused):
        assert "hidden_size = 7" in refused("list", "--hidden-size", "7")


class TestProgram:
    """The installed command, as a process."""

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "lm_zoo.cli", *arguments], capture_output=True, text=True, **options
        )

    @pytest.mark.parametrize("arguments", [[], ["fly"], ["eval"], ["eval", "perplexity"], ["generate", "x"]])
    def test_refuses_incomplete_commands(self, arguments, refused):
        assert "--help" in refused(*arguments)

    def test_errors_are_one_line(self, tmp_path):
        done = self.run("generate", str(tmp_path / "nothing"), "--prompt", "a")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr

    def test_reader_that_leaves_early_is_no_crash(self):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as stdout:
            command = [sys.executable, "-m", "lm_zoo.cli", "list"]
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 141
        assert done.stderr == ""

    def test_interrupt_is_quiet(self, monkeypatch, capsys):
        def interrupt(hidden_size):
            raise KeyboardInterrupt

        monkeypatch.setattr("lm_zoo.eval.mixers.print_mixers", interrupt)
        assert main(["list"]) == 130
        assert capsys.readouterr().err == ""

    def test_bugs_keep_their_traceback(self, monkeypatch):
        monkeypatch.setattr("lm_zoo.eval.mixers.print_mixers", lambda hidden_size: int("not a number"))
        with pytest.raises(ValueError, match="invalid literal"):
            main(["list"])

    def test_full_disk_is_one_line(self, saved, text, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        out = tmp_path / "out.json"
        out.write_text("earlier")
        # the measurement itself is printed before; only the file fails
        assert main(["eval", "perplexity", str(saved), "--text", str(text), "--json", str(out)]) == 2
        assert out.read_text() == "earlier"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.txt"]
