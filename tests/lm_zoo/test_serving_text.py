"""Text out of tokens one at a time, and where it stops: as if all had been there at once."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm_zoo.serving.text import UNFINISHED, Decoder, StopStrings
from lm_zoo.train.tokenizers import byte_tokenizer, train_bpe

TEXT = "Grüße, 世界! 🌍👩‍🚀 naïve — “quoted” €5 𝕊 end"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with their space before them, and bytes for what is in no word, as in Llama's tokenizers."""
    words = ["<unk>", "▁", "▁the", "▁state", "▁of", "s", "é", "!"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bpe": lambda: train_bpe([TEXT * 20, "the state of the gate " * 20], 300),
    "sentencepiece": sentencepiece_like,
}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def pieces_of(tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    decoder = Decoder(tokenizer, prompt)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def whole(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_pieces_are_the_text_wherever_the_prompt_ends(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for cut in range(len(ids)):
        pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
        ends = (whole(tokenizer, ids[:end]) for end in range(cut, -1, -1))
        shown = next(text for text in ends if not text.endswith(UNFINISHED))  # of a character's part, nothing
        assert shown + "".join(pieces) == whole(tokenizer, ids)
        assert not any(UNFINISHED in piece for piece in pieces)


def test_words_keep_their_space():
    tokenizer = sentencepiece_like()
    the, state, s = (tokenizer.convert_tokens_to_ids(word) for word in ("▁the", "▁state", "s"))
    assert pieces_of(tokenizer, [the], [state, s, the]) == [" state", "s", " the", ""]
    assert pieces_of(tokenizer, [], [state, the]) == ["state", " the", ""]


def test_a_character_comes_when_it_is_whole():
    tokenizer = byte_tokenizer()
    assert pieces_of(tokenizer, [65], list("é🌍".encode())) == ["", "é", "", "", "", "🌍", ""]


def test_what_never_becomes_a_character_comes_at_the_end():
    tokenizer = byte_tokenizer()
    assert pieces_of(tokenizer, [65], [66, 0xE2, 0x82]) == ["B", "", "", UNFINISHED]
    # and with the next whole character
    assert "".join(pieces_of(tokenizer, [65], [0xE2, 66, 67])) == UNFINISHED + "BC"


def test_special_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    assert pieces_of(tokenizer, [end], [65, end, 66]) == ["A", "", "B", ""]


def cut_at(text: str, stops: list[str]) -> tuple[str, bool]:
    """What StopStrings must give for the whole text, once it has seen the first stop string to be complete."""
    for end in range(len(text) + 1):
        found = [text.find(stop, 0, end) for stop in stops]
        if any(at >= 0 for at in found):
            return text[: min(at for at in found if at >= 0)], True
    return text, False


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["abab", "ba"], ["aaaa"], ["abc", "bca", "c"], []])
def test_stop_strings_wherever_pieces_end(stops):
    draws = random.Random(0)
    for _ in range(200):
        text = "".join(draws.choices("abc", k=12))
        expected, stopped = cut_at(text, stops)
        found, ended = "", False
        strings = StopStrings(stops)
        for character in text:
            piece, ended = strings.push(character)
            found += piece
            if ended:
                break
            # What is held back is no more than the beginning of a stop string.
            assert len(found) > len(text[: len(found)]) - max(map(len, stops), default=1)
        assert (found if ended else found + strings.flush(), ended) == (expected, stopped), text


def test_stop_strings_in_one_piece():
    assert StopStrings(["\n\n", "END"]).push("one\ntwo END\n\n") == ("one\ntwo ", True)
    strings = StopStrings(["\n\n"])
    assert strings.push("one\n") == ("one", False)
    assert strings.push("two\n") == ("\ntwo", False)
    assert strings.flush() == "\n"
