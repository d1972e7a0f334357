"""`lm-zoo serve` by the eyes of people who type it."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
from served_models import endless_tokenizer, tiny_model

from lm_zoo.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().float().save_pretrained(folder)
    endless_tokenizer().save_pretrained(folder)
    return folder


class TestCommand:
    def refuse(self, capsys, *arguments) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        return err

    def test_a_port_in_use(self, folder, capsys):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            error = self.refuse(capsys, folder, "--port", port)
        assert error == f"lm-zoo: error: port {port} of 127.0.0.1 is in use; name another one with --port\n"

    def test_without_the_extra(self, folder, capsys, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
        )
        assert 'pip install "lm_zoo[serve]"' in self.refuse(capsys, folder)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--port", "65536"], "'65536' is not a port"),
            (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
            (["--api-key", " "], "the API key is empty"),
            (["--max-batch", "0"], "'0' is not a whole number of at least 1"),
            (["--port", "0", "--prefix-store", "much"], "budget must be a number of bytes or a string such as"),
        ],
    )
    def test_impossible_options(self, folder, capsys, options, expected):
        assert expected in self.refuse(capsys, folder, *options)

    def test_no_model(self, tmp_path, capsys):
        assert "no model folder" in self.refuse(capsys, tmp_path / "none")

    @pytest.mark.slow
    def test_from_the_command_to_the_signal(self, folder):
        command = [sys.executable, "-m", "lm_zoo.cli", "serve", str(folder), "--port", "0", "--prefix-store", "1MB"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            line = process.stderr.readline()
            root = re.fullmatch(r"lm-zoo: tiny at (http://127\.0\.0\.1:\d+/v1)\n", line)[1]
            client = openai.OpenAI(base_url=root, api_key="none", max_retries=0)
            stream = client.completions.create(model="tiny", prompt="Once", max_tokens=1000, stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason == "length"
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
