"""Text at size: the same tokens however they are made, and a folder that says what it holds."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest

from lm_zoo.cli import main
from lm_zoo.errors import UserError
from lm_zoo.train import TextData, sources
from lm_zoo.train.corpus import Corpus
from lm_zoo.train.prepare import prepare, prepared_tokenizer, read_manifest
from lm_zoo.train.sources import TextFiles, file_source, find_files
from lm_zoo.train.tokenizers import byte_tokenizer, train_bpe

END = 256


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(sources, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(sources, "SEPARATOR_WINDOW", 17_000)


def texts(corpus: Corpus) -> list[str]:
    whole = np.concatenate([corpus.tokens(int(s), int(n)) for s, n in zip(corpus.starts, corpus.lengths, strict=True)])
    ends = np.flatnonzero(whole == END)
    assert ends[-1] == len(whole) - 1
    assert int(corpus.starts_document.sum()) == len(ends)
    return [
        bytes(part.astype(np.uint8)).decode()
        for part in np.split(whole[whole != END], ends[:-1] - np.arange(len(ends) - 1))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n", None])
def test_documents_come_back_from_shards(tmp_path, make_text, separator) -> None:
    """Also those that are longer than a shard, and those that are blank."""
    parts = [make_text(n, n) for n in (5, 9000, 300, 800, 20_000, 1, 700)]
    parts = [part.replace("\n", " ") for part in parts] if separator == "\n" else parts
    file = tmp_path / "text.txt"
    file.write_text((separator or "\n").join([*parts[:3], " ", *parts[3:]]))
    small = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(small):
        path.write_text(make_text(100, i))
    source = TextFiles((small[0], file, *small[1:]), separator)
    counts = prepare(source, byte_tokenizer(), tmp_path / "out", workers=2)
    corpus = Corpus(tmp_path / "out")
    expected = parts if separator else [file.read_text()]
    if separator == "\n":
        expected = [
            line for path in (small[0], file, *small[1:]) for line in path.read_text().split("\n") if line.strip()
        ]
        assert texts(corpus) == expected
    else:
        assert texts(corpus) == [small[0].read_text(), *expected, *(path.read_text() for path in small[1:])]
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 5
    assert counts.documents == corpus.starts_document.sum()
    assert counts.tokens == len(corpus) == corpus.lengths.sum()
    assert counts.text_bytes == corpus.num_bytes.sum() == len(corpus) - counts.documents


@pytest.mark.usefixtures("small_shards")
def test_the_bytes_do_not_depend_on_processes_and_interruptions(tmp_path, make_text, monkeypatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text(make_text(40_000))
    source, tokenizer = TextFiles((file,)), byte_tokenizer()
    prepare(source, tokenizer, tmp_path / "one", workers=1)
    prepare(source, tokenizer, tmp_path / "two", workers=2)
    expected = contents(tmp_path / "one")
    assert expected == contents(tmp_path / "two")
    assert sorted(expected)[0] == "manifest.json"

    real, calls = TextFiles.pieces, []

    def stop_at_the_fifth(self, rows):
        calls.append(rows)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(TextFiles, "pieces", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer, tmp_path / "parts", workers=1)
    with pytest.raises(UserError, match="parts is only half prepared; run the same `lm-zoo data prepare` again"):
        read_manifest(tmp_path / "parts")
    shard = tmp_path / "parts" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # one of the four is not what it was
    prepare(source, tokenizer, tmp_path / "parts", workers=1)
    assert len(calls) == 5 + len(list((tmp_path / "one").glob("*.arrow"))) - 3
    assert expected == contents(tmp_path / "parts")
    monkeypatch.setattr(TextFiles, "pieces", lambda *_: pytest.fail("tokenised again"))
    prepare(source, tokenizer, tmp_path / "parts")


def runs(process: str) -> bool:
    """A zombie, which no one has asked about yet, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_kills_cost_no_more_than_the_shards_under_way(tmp_path, make_text) -> None:
    """SIGKILL to the command: its workers end with it, and the next start makes the same bytes."""
    file = tmp_path / "text.txt"
    file.write_text(make_text(100_000) * 200)
    command = [sys.executable, "-m", "lm_zoo.cli", "data", "prepare", "--files", str(file), "--workers", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    out, kept = tmp_path / "parts", -1
    for _ in range(2):
        with subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("shard-*.json"))) <= max(kept, 0):
                time.sleep(0.01)
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            process.kill()
        kept = len(list(out.glob("shard-*.json")))
        deadline = time.monotonic() + 20
        while any(runs(worker) for worker in workers.stdout.split()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert kept > 0
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_urls_are_streamed(tmp_path, make_text, kind, protocol) -> None:
    """What fsspec opens: an object store is the same to it."""
    documents = [make_text(20, i) for i in range(1000)]
    local = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        local.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        datasets.Dataset.from_dict({"text": documents}).to_parquet(local)
    url = f"file://{local}" if protocol == "file" else f"memory://faults/rows.{kind}"
    if protocol == "memory":
        with fsspec.open(url, "wb") as file:
            file.write(local.read_bytes())
    source = file_source(find_files([url]), text_column="text", separator=None, streaming=True)
    prepare(source, byte_tokenizer(), tmp_path / "out", workers=2)
    assert texts(Corpus(tmp_path / "out")) == documents
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 2


@pytest.mark.usefixtures("small_shards")
def test_text_files_at_urls(tmp_path, make_text) -> None:
    documents = [make_text(n, n) for n in (3000, 20_000, 4)]
    for i, text in enumerate(documents):
        with fsspec.open(f"memory://texts/{i}.txt", "wb") as file:
            file.write(text.encode())
    source = TextFiles(find_files(["memory://texts/*.txt"]))
    prepare(source, byte_tokenizer(), tmp_path / "out", workers=2)
    assert texts(Corpus(tmp_path / "out")) == documents
    with pytest.raises(UserError, match=r"there is no file memory://texts/nothing.txt; check the address"):
        find_files(["memory://texts/nothing.txt"])
    with pytest.raises(UserError, match=r"cannot open nowhere://x: "):
        find_files(["nowhere://x"])


def test_the_command_and_a_run_on_what_it_made(tmp_path, make_text, start_run, capsys) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(make_text(6000))
    command = ["data", "prepare", "--files", str(file), "--out", str(out), "--tokenizer", "bpe", "--vocab-size", "300"]
    for _ in range(2):  # the second time there is nothing to do
        assert main([*command, "--workers", "1"]) == 0
        assert "1 documents, " in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"manifest.json", "shard-00000.arrow", "tokenizer"}
    direct = {"tokenizer": str(out / "tokenizer")}
    _, from_text = start_run("a", max_steps=3, data=direct)
    _, prepared = start_run("b", max_steps=3, data={"files": None, "prepared": str(out)})
    assert prepared.model.lm_head.weight.equal(from_text.model.lm_head.weight)
    train_bpe([make_text(500, 9)], 300).save_pretrained(tmp_path / "other")  # of the same size
    with pytest.raises(UserError, match=r"checkpoint was made with tokenizer = \w+, now it is \w+"):
        start_run("a", max_steps=4, resume="last", data={"tokenizer": str(tmp_path / "other")})


def test_what_does_not_match_is_told_before_any_training(tmp_path, make_text, start_run, capsys) -> None:
    file, out = tmp_path / "some.txt", tmp_path / "out"
    file.write_text(make_text(3000))
    prepare(TextFiles((file,)), train_bpe([make_text(500)], 270), out)
    data = {"files": None, "prepared": str(out)}

    def refused(message: str, **more) -> None:
        with pytest.raises(UserError, match=message) as error:
            start_run("run", max_steps=2, data=data | more)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()

    refused("out was prepared with a tokenizer of its own, and data.tokenizer=bytes is another one", tokenizer="bytes")
    refused("data.files and data.prepared are both given", files=str(file))
    refused("data.weights has 2 numbers for 1 folders", weights=[1, 2])
    refused("is no folder of prepared text; make one with `lm-zoo data prepare`", prepared=str(tmp_path))
    prepare(TextFiles((file,)), byte_tokenizer(), tmp_path / "bytes")
    refused("were prepared with different tokenizers", prepared=[str(out), str(tmp_path / "bytes")])
    whole = contents(out)
    shard = out / "shard-00000.arrow"
    for damage, message in [
        (
            lambda: shard.write_bytes(whole[shard.name][:-9]),
            r"shard-00000.arrow is [\d,]+ bytes, expected [\d,]+ bytes",
        ),
        (shard.unlink, r"does not match its manifest.json: shard-00000.arrow is not there"),
        (
            lambda: shutil.copy(shard, out / "shard-00001.arrow"),
            r"shard-00001.arrow is [\d,]+ bytes, expected not there",
        ),
        (lambda: (out / "manifest.json").write_text("{"), r"manifest.json is damaged; prepare the text anew"),
        (
            lambda: byte_tokenizer().save_pretrained(out / "tokenizer"),
            r"tokenizer has changed since; prepare the text anew",
        ),
    ]:
        damage()
        refused(message)
        shutil.rmtree(out)
        for name, content in whole.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    assert prepared_tokenizer(out).eos_token_id is not None
    with pytest.raises(UserError, match=r"out was begun with another tokenizer; choose another --out, or remove it"):
        prepare(TextFiles((file,)), byte_tokenizer(), out)
    os.utime(file, (0, 0))
    for options, message in [
        (["--files", str(file), "--out", str(tmp_path / "bytes")], "bytes was begun with other text; choose another"),
        (["--files", str(file), "--out", str(tmp_path)], "holds something else; choose another --out, or empty it"),
        (["--files", "nope.txt", "--out", "x"], "nope.txt does not exist"),
        (["--files", str(file), "--out", "x", "--workers", "0"], "--workers 0 is not possible; give at least 1"),
        (["--out", "x"], "one of the arguments --files --name is required"),
    ]:
        assert main(["data", "prepare", *options]) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


def test_what_is_read_is_given_back(tmp_path, make_text, monkeypatch) -> None:
    """Reading through a corpus again and again leaves no more of it in memory than RELEASE_BYTES."""
    monkeypatch.setattr("lm_zoo.train.corpus.RELEASE_BYTES", 2**21)
    file = tmp_path / "text.txt"
    file.write_text(make_text(2_000) * 1500)
    prepare(TextFiles((file,)), byte_tokenizer(), tmp_path / "out")
    corpus, resident = Corpus(tmp_path / "out"), []
    for i, (start, length) in enumerate(zip(corpus.starts.tolist(), corpus.lengths.tolist(), strict=True)):
        assert corpus.tokens(start, length)[0] < 300
        if i % 100 == 0:
            resident.append(mapped_bytes(tmp_path / "out"))
    assert corpus._tokens[0].nbytes * len(corpus._tokens) > 2**24
    assert max(resident) < 2**22
    rows = TextData(prepared=str(tmp_path / "out"), seq_len=64, val_fraction=0)
    rows.setup()
    assert len(rows.train_rows) == len(corpus) // 64


def mapped_bytes(folder: Path) -> int:
    """Resident bytes of the mappings of a folder's files."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return 1024 * sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for at in lines if str(folder) in at
    )
