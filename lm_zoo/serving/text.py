"""Text out of tokens as they come, and the strings at which it ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # tokens at the end of a prompt within which a character ends
COUNTS = range(4, 8)  # tokens before that are looked at: as many as a character has bytes, so that one begins there
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for bytes that are no whole character (yet)


class Decoder:
    """`push` tokens, and get the text that is certain by now: together that of decoding all of them at once.

    A character may be spread over tokens, and what a token is written as may depend on the one before. So the tokens of
    the last piece are decoded again with the new ones, and what comes out beyond it is the next piece; none comes as
    long as the end is no whole character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        # A prompt of ids may end within a character, which is then the first one of the text.
        for end, count in itertools.product(range(len(prompt), len(prompt) - CONTEXT, -1), COUNTS):
            start = max(0, end - count)
            self._given = self._decode(prompt[start:end])
            if not self._given.startswith(UNFINISHED) and not self._given.endswith(UNFINISHED):
                break
        else:
            start, end, self._given = len(prompt), len(prompt), ""
        self._ids = list(prompt[start:])
        self._begin = end - start  # of the tokens whose text was not given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        new = text[len(self._given) :]
        if not new or text.endswith(UNFINISHED):
            return ""
        del self._ids[: self._begin]
        self._begin = len(self._ids)
        self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """The rest, at the end of the text."""
        return self._decode(self._ids)[len(self._given) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """`push` text, and get what is certain to come before the first of the strings, wherever pieces begin and end."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""  # what may be the beginning of one

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether it ends there."""
        text = self._held + text
        found = [at for at in (text.find(string) for string in self._strings) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        longest = max(map(len, self._strings), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-count:]) for string in self._strings):
                break
        else:
            count = 0
        self._held = text[len(text) - count :]
        return text[: len(text) - count], False

    def flush(self) -> str:
        """The rest, at the end of the text."""
        held, self._held = self._held, ""
        return held
