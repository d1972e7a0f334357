"""Texts: framed as the tokenizer frames them, whole, packed, and held out for good."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from linearize_fixtures import documents, load_data, tokenizer, write_text
from tokenizers.processors import TemplateProcessing

from lm_zoo.errors import UserError
from lm_zoo.train.linearize.data import LinearizeData, PackedRows, TextOptions, Texts, pack, prefix
from lm_zoo.train.packing import Selection
from lm_zoo.train.tokenizers import byte_tokenizer


def with_bos():
    """The bytes, with a beginning-of-sequence token before every text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("size", [7, 64])
def test_packing_loses_nothing_and_fills_rows(size) -> None:
    generator = random.Random(size)
    lengths = [generator.randint(1, size) for _ in range(300)]
    rows = pack(lengths, size)
    assert sorted(itertools.chain(*rows)) == list(range(300))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert max(filled) <= size
    assert sum(filled) > 0.97 * size * len(rows)


@pytest.mark.parametrize("make", [byte_tokenizer, with_bos])
@pytest.mark.parametrize("length", [16, 1000])
def test_texts_are_what_the_tokenizer_makes_of_the_documents(tmp_path, make, length) -> None:
    """In order, cut at the length, each part with the tokenizer's frame, and without the end-of-text token."""
    tokenizer = make()
    options = TextOptions(files=(write_text(tmp_path / "text.txt"),), cache_dir=tmp_path / "cache")
    data = LinearizeData.load(options, tokenizer, 0.2)
    texts = Texts(Selection.all_of(data.training.corpus), tokenizer, length)
    before = prefix(tokenizer).tolist()
    assert before == ([] if make is byte_tokenizer else [tokenizer.bos_token_id])
    expected = []
    for document in documents():
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        room = length - len(before)
        expected += [before + ids[i : i + room] for i in range(0, len(ids), room)]
    expected = [ids for ids in expected if len(ids) >= 2]
    assert [texts[i].tolist() for i in range(len(texts))] == expected
    assert texts.lengths() == [len(ids) for ids in expected]


def test_long_documents_are_read_across_pieces(tmp_path) -> None:
    """A document is tokenised in pieces of 4 kB, which texts do not show."""
    path = tmp_path / "long.txt"
    content = " ".join(documents(400))
    path.write_text(content)
    options = TextOptions(files=(str(path),), val_files=(str(path),), cache_dir=tmp_path / "cache")
    rows = LinearizeData.load(options, tokenizer(), 0.2).rows("training", 3000)
    assert len(content) > 2 * 4096
    ids = np.concatenate([rows.texts[i] for i in range(len(rows.texts))])
    assert ids.tolist() == list(content.encode())


def test_parts_share_no_document(tmp_path) -> None:
    data = load_data(tmp_path)
    parts = {}
    for part in ("training", "choosing", "measuring"):
        texts = data.rows(part, 1000).texts
        parts[part] = {bytes(texts[i].tolist()) for i in range(len(texts))}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == len(set(documents()))


def test_a_batch_is_its_rows_texts_end_to_end(tmp_path) -> None:
    rows = load_data(tmp_path).rows("training", 64)
    batch = rows.batch([3, 0])
    expected = [rows.texts[text] for row in (3, 0) for text in rows.rows[row]]
    assert batch.input_ids.shape == (1, sum(map(len, expected)))
    parts = [batch.input_ids[0, start:end].tolist() for start, end in itertools.pairwise(batch.cu_seqlens.tolist())]
    assert parts == [text.tolist() for text in expected]
    index, targets = batch.next_tokens()
    assert targets.tolist() == [token for text in expected for token in text[1:].tolist()]
    assert batch.input_ids[0, index].tolist() == [token for text in expected for token in text[:-1].tolist()]


def test_batches_stop_near_the_tokens_that_are_asked_for(tmp_path) -> None:
    rows = load_data(tmp_path).rows("training", 64)
    seen = list(rows.batches(2, max_tokens=300))
    counts = [batch.input_ids.shape[1] for batch in seen]
    assert sum(counts[:-1]) < 300 <= sum(counts)
    everything = torch.cat([batch.input_ids for batch in rows.batches(3)], dim=1)
    assert everything.shape[1] == sum(rows.texts.lengths())


def test_json_lines_and_validation_files(tmp_path) -> None:
    train, val = tmp_path / "train.jsonl", tmp_path / "val.txt"
    train.write_text('{"story": "one two three"}\n{"story": "  four five \\n"}\n')
    val.write_text("six seven\n<|endoftext|>\neight nine")
    options = TextOptions(files=(str(train),), text_column="story", val_files=(str(val),), cache_dir=tmp_path / "cache")
    data = LinearizeData.load(options, tokenizer(), 0.5)
    texts = {
        part: [bytes(text.tolist()).decode() for text in iter_texts(data.rows(part, 100))]
        for part in ("training", "choosing", "measuring")
    }
    assert sorted(texts["training"]) == ["four five", "one two three"]
    assert sorted(texts["choosing"] + texts["measuring"]) == ["eight nine", "six seven"]


def iter_texts(rows: PackedRows):
    return (rows.texts[i] for i in range(len(rows.texts)))


def test_bad_texts_are_named(tmp_path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    options = TextOptions(files=(str(empty),), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=r"empty\.txt: no text in there"):
        LinearizeData.load(options, tokenizer(), 0.1)
    with pytest.raises(UserError, match="one of both"):
        LinearizeData.load(dataclasses.replace(options, dataset="x"), tokenizer(), 0.1)
    no_end = byte_tokenizer()
    no_end.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        LinearizeData.load(options, no_end, 0.1)
    short = tmp_path / "short.txt"
    short.write_text("a")
    options = TextOptions(files=(str(short),), val_files=(str(short),), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="no text to train on"):
        LinearizeData.load(options, tokenizer(), 0.1).rows("training", 8)
