"""Tokenizers give back every text, survive saving, and say clearly when they cannot be used."""

import random
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm_zoo.errors import UserError
from lm_zoo.train.tokenizers import END_OF_TEXT, byte_tokenizer, load_tokenizer, train_bpe, vocabulary_size

TEXTS = [
    "",
    "plain words, don't  stop.",
    "  indented\n\n\n\tlines \r\nend ",
    "Größe 态 🙂 \u0000 \u200b\ufeff",
    f"a {END_OF_TEXT} inside",
    "<b> [PAD] </s> ## Ġ Ċ",
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    generator = random.Random(0)
    return train_bpe((" ".join(generator.choices(["state", "gate", "decay"], k=50)) for _ in range(20)), 265)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe) -> PreTrainedTokenizerFast:
    return byte_tokenizer() if request.param == "bytes" else bpe


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(tokenizer, text) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_characters_come_back(tokenizer) -> None:
    generator = random.Random(1)
    codes = [code for code in (generator.randrange(0x110000) for _ in range(3000)) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, codes))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_tokenizers_load_without_this_package(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert loaded.padding_side == "left"
    assert load_tokenizer(tmp_path)("state gate")["input_ids"] == tokenizer("state gate")["input_ids"]


def test_bytes_are_their_own_ids() -> None:
    text = "aé🙂\n"
    assert byte_tokenizer()(text)["input_ids"] == list(text.encode())
    assert vocabulary_size(byte_tokenizer()) == 258


def test_bpe_learns_words_up_to_the_size_asked_for(bpe) -> None:
    assert vocabulary_size(bpe) == 265
    assert len(bpe(" state gate decay")["input_ids"]) < len("state gate decay")
    with pytest.raises(UserError, match="vocab_size=257 is too small for a trained tokenizer; give at least 258"):
        train_bpe(["text"], 257)


def test_unusable_tokenizers_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*; give 'bytes', 'bpe', a folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    endless = byte_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(tmp_path)
