"""Text from files, JSON lines, parquet and `datasets`: every document whole, in a cache that is whole."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from lm_zoo.errors import UserError
from lm_zoo.train import sources
from lm_zoo.train.corpus import Corpus, tokenise
from lm_zoo.train.sources import Table, TextFiles, file_source, find_files
from lm_zoo.train.tokenizers import byte_tokenizer

END = 256  # the end-of-text token of the byte tokenizer


def documents(corpus: Corpus) -> list[str]:
    """The texts of a corpus, from its tokens."""
    texts: list[list[int]] = []
    for start, length, begins in zip(corpus.starts, corpus.lengths, corpus.starts_document, strict=True):
        if begins:
            texts.append([])
        texts[-1] += corpus.tokens(int(start), int(length)).tolist()
    assert all(tokens[-1] == END and END not in tokens[:-1] for tokens in texts)
    return [bytes(tokens[:-1]).decode() for tokens in texts]


def read(source, tmp_path, **options) -> Corpus:
    corpus = Corpus(tokenise(source, byte_tokenizer(), tmp_path / "cache", **options))
    assert len(corpus) == corpus.lengths.sum()
    return corpus


@pytest.mark.parametrize("num_proc", [None, 2])
def test_text_files_are_documents(tmp_path, make_text, num_proc) -> None:
    texts = ["one\r\n", make_text(4000), "x" * 40_000, "态" * 20_000, "\n" * 9000, "last"]
    files = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    empty = tmp_path / "empty.txt"
    empty.touch()
    corpus = read(TextFiles((*files[:3], empty, *files[3:])), tmp_path, num_proc=num_proc)
    assert documents(corpus) == texts
    assert corpus.num_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert len(corpus.lengths) > 15  # long documents are read piece by piece
    assert corpus.num_bytes.max() <= 4 * sources.PIECE_BYTES + 3
    assert len(set(corpus.keys)) == len(texts)


def test_pieces_end_where_tokenizers_split_anyway(tmp_path) -> None:
    file = tmp_path / "code.py"
    file.write_text("def f(x):\n    return x\n\n\n" * 2000)
    source = TextFiles((file,))
    pieces = [piece for rows in source.shards() for piece in source.pieces(rows)]
    assert len(pieces) > 5
    assert all(piece.text.endswith("\n") and piece.text.startswith("def") for piece in pieces)


def test_a_separator_splits_a_file(tmp_path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("one<|endoftext|>\ntwo<|endoftext|>  \n<|endoftext|>three")
    assert documents(read(TextFiles((file,), "<|endoftext|>"), tmp_path)) == ["one", "\ntwo", "three"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_tables(tmp_path, make_text, kind, streaming) -> None:
    texts = [make_text(30, seed) for seed in range(300)] + ["", make_text(3000)]
    rows = datasets.Dataset.from_dict({"body": texts, "id": list(range(len(texts)))})
    if kind == "jsonl":
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"id": 0, "body": text}) + "\n" for text in texts))
    else:
        file = tmp_path / "rows" / "train.parquet"
        file.parent.mkdir()
        rows.to_parquet(file)
    if kind == "folder":
        source = Table(str(file.parent), text_column="body", streaming=streaming)
    else:
        source = file_source((file,), text_column="body", separator=None, streaming=streaming)
    assert documents(read(source, tmp_path)) == [text for text in texts if text]


def test_a_stream_stops_at_max_tokens(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i:05}"}) + "\n" for i in range(5000)))
    source = file_source((file,), text_column="text", separator=None, streaming=True)
    corpus = read(source, tmp_path, max_tokens=10_000)
    assert 10_000 <= len(corpus) < 10_000 + 256 * 20
    assert documents(corpus)[:2] == ["document 00000", "document 00001"]


def test_the_cache_is_used_until_something_changes(tmp_path, monkeypatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text")
    source, cache = TextFiles((file,)), tmp_path / "cache"
    folder = tokenise(source, byte_tokenizer(), cache)
    monkeypatch.setattr(TextFiles, "pieces", lambda *_: pytest.fail("tokenised again"))
    assert tokenise(source, byte_tokenizer(), cache) == folder
    monkeypatch.undo()
    os.utime(file, (0, 0))
    other = tokenise(source, byte_tokenizer(), cache)
    assert other != folder
    assert tokenise(TextFiles((file,), "x"), byte_tokenizer(), cache) != other
    assert np.array_equal(Corpus(other).tokens(0, 10), Corpus(folder).tokens(0, 10))
    assert {path.name for path in cache.iterdir()} == {
        folder.name,
        other.name,
        tokenise(TextFiles((file,), "x"), byte_tokenizer(), cache).name,
    }


def test_a_failure_leaves_no_cache(tmp_path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("good " * 5000)
    bad.write_bytes(b"fine until \xff here")
    with pytest.raises(UserError, match=r"bad\.txt: byte 11 is not UTF-8; convert the file"):
        tokenise(TextFiles((good, bad)), byte_tokenizer(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_files_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", "deep/list", "odd[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("deep/list").write_text("b.txt\n\ner/c.txt\n")
    names = [str(path) for path in find_files(["**/*.txt"])]
    assert names == ["a.txt", "deep/b.txt", "deep/er/c.txt", "odd[1].txt"]
    assert [str(path) for path in find_files(["@deep/list", "a.txt", "deep/b.txt"])] == [
        "deep/b.txt",
        "deep/er/c.txt",
        "a.txt",
    ]
    assert [str(path) for path in find_files(["odd[1].txt"])] == ["odd[1].txt"]
    for patterns, message in [
        (["missing.txt"], "missing.txt does not exist"),
        (["*.md"], "no file matches"),
        (["deep"], "deep is a folder; give its files"),
        (["@nothing"], "nothing does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            find_files(patterns)


def test_unreadable_tables_are_refused(tmp_path) -> None:
    text, broken, empty = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    text.write_text("text")
    broken.write_text("no json\n")
    empty.touch()
    numbers = tmp_path / "d.jsonl"
    numbers.write_text('{"text": 3}\n')
    options = {"text_column": "text", "separator": None, "streaming": False}
    with pytest.raises(UserError, match="cannot be mixed in one source"):
        file_source((text, broken), **options)
    with pytest.raises(UserError, match=r"c\.jsonl is empty"):
        file_source((empty,), **options)
    for file, message in [(broken, r"cannot read .*b\.jsonl"), (numbers, "holds int, expected text")]:
        with pytest.raises(UserError, match=message):
            tokenise(file_source((file,), **options), byte_tokenizer(), tmp_path / "cache")
    with pytest.raises(UserError, match=r"no column 'body', only text; set data.text_column"):
        next(file_source((numbers,), **{**options, "text_column": "body"}).shards())
    with pytest.raises(UserError, match=r"cannot read the dataset '.*nowhere'"):
        next(Table(str(tmp_path / "nowhere")).shards())
    with pytest.raises(UserError, match="no text in there"):
        tokenise(TextFiles((empty,)), byte_tokenizer(), tmp_path / "cache")
