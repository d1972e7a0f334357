"""One text of an engine: what was asked for, and what comes of it, piece by piece."""

from __future__ import annotations

import itertools
import queue
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lm_zoo.serving.sampling import Logprobs, Sampling
from lm_zoo.serving.text import Decoder, StopStrings

_numbers = itertools.count()


class EngineError(RuntimeError):
    """Why an engine refused a text or did not finish it."""


class QueueFull(EngineError):
    """As many texts wait as may."""


class Closed(EngineError):
    """The engine takes no more texts, or ended this one because it closes."""


@dataclass(frozen=True)
class Piece:
    """What a step has added. The last piece of a text has a `finish_reason`, and the only one that may have no token.

    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens), "timeout", "cancelled"; or "error",
        with what went wrong in `error`.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: str | None = None
    error: EngineError | None = None

    def followed_by(self, other: Piece) -> Piece:
        """Both as one."""
        return Piece(
            self.text + other.text,
            self.tokens + other.tokens,
            self.logprobs + other.logprobs,
            other.finish_reason,
            other.error,
        )


@dataclass(frozen=True)
class Completion:
    """A whole text."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: str
    prompt_tokens: int

    @classmethod
    def of(cls, pieces: list[Piece], prompt_tokens: int) -> Completion:
        return cls(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            tuple(logprobs for piece in pieces for logprobs in piece.logprobs),
            pieces[-1].finish_reason,
            prompt_tokens,
        )


class Request:
    """A text that an engine has taken in: iterate over its pieces as they come, or wait for the `result`.

    Either can be done once, by one thread. With a `listener` the pieces go to that instead.
    """

    def __init__(
        self,
        ids: list[int],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        max_seconds: float | None,
        listener: Callable[[Piece], None] | None,
    ):
        self.number = next(_numbers)
        self.ids = ids
        self.sampling = sampling
        self.submitted = time.monotonic()
        self.deadline = None if max_seconds is None else self.submitted + max_seconds
        self.cancelled = False
        self.written = 0  # tokens
        self.finish_reason: str | None = None
        self._ends = ends
        self._random = random.Random(sampling.seed)
        self._decoder = Decoder(tokenizer, ids)
        self._stops = StopStrings(sampling.stop)
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._listener = self._pieces.put if listener is None else listener

    def __repr__(self) -> str:
        return f"Request({self.number}, {len(self.ids)} tokens, {self.written} written, {self.finish_reason})"

    def __iter__(self) -> Iterator[Piece]:
        """Raises EngineError where the text could not be finished."""
        while True:
            piece = self._pieces.get()
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.finish_reason is not None:
                return

    def result(self) -> Completion:
        """The whole text, when it is finished. Raises EngineError where it could not be."""
        return Completion.of(list(self), len(self.ids))

    def draw(self) -> float:
        """The next random number of this text."""
        return self._random.random()

    def write(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Take in the next token of the text, which may be its last."""
        self.written += 1
        text, stopped = "", token in self._ends
        if not stopped:
            text, stopped = self._stops.push(self._decoder.push(token))
        if stopped or self.written == self.sampling.max_tokens:
            self.finish_reason = "stop" if stopped else "length"
            if token in self._ends or not stopped:
                text += self._rest()
        self._tell(Piece(text, (token,), () if logprobs is None else (logprobs,), self.finish_reason))

    def finish(self, reason: str, error: EngineError | None = None) -> None:
        """End the text where it is."""
        self.finish_reason = reason
        self._tell(Piece("" if error else self._rest(), finish_reason=reason, error=error))

    def _rest(self) -> str:
        """What was held back: it did not become a stop string, or a whole character."""
        text, stopped = self._stops.push(self._decoder.flush())
        return text if stopped else text + self._stops.flush()

    def _tell(self, piece: Piece) -> None:
        try:
            self._listener(piece)
        except Exception:  # whoever listens is gone, and the other texts go on
            self.cancelled = True
