"""The OpenAI protocol: what requests may ask for, and how answers are written."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from lm_zoo.errors import UserError
from lm_zoo.serving.request import Completion, Piece
from lm_zoo.serving.sampling import Logprobs, Sampling

MAX_CHOICES = 128  # texts of one request
# What clients send along and no server needs to heed. Other fields that are unknown are refused unless they ask for
# nothing, so that nobody takes a penalty or a tool for heeded that is not.
IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
NOTHING = (None, False, 0, "", [], {}, {"type": "text"})
LOWEST_LOGPROB = -9999.0  # JSON has no infinity
FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_unknown(self):
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value not in NOTHING:
                raise ValueError(f"{name!r} is not supported here; leave it out")
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ValueError(f"n must be from 1 to {MAX_CHOICES}, got {self.n}")
        return self

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self, max_tokens: int | None, logprobs: int | None) -> list[Sampling]:
        """Of each of the `n` texts. UserError names what is out of range."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        options = {name: value for name, value in given.items() if value is not None}
        options |= {"max_tokens": max_tokens, "logprobs": logprobs, "stop": stop}
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n or 1)]
        try:
            return [Sampling(seed=seed, **options) for seed in seeds]
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error


class CompletionBody(Body):
    """POST /v1/completions"""

    kind: ClassVar[str] = "text_completion"

    prompt: Any
    max_tokens: int | None = 16
    logprobs: int | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        many = isinstance(prompt, list) and 0 < len(prompt) <= MAX_CHOICES
        several = many and (all(isinstance(text, str) for text in prompt) or all(_is_ids(ids) for ids in prompt))
        if isinstance(prompt, str) or _is_ids(prompt) or several:
            return prompt
        raise ValueError(
            f"must be a string, a list of token ids, or a list of up to {MAX_CHOICES} strings or lists of token ids"
        )

    @model_validator(mode="after")
    def _check_choices(self):
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n times the number of prompts must be at most {MAX_CHOICES}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not _is_ids(self.prompt)
        return self.prompt if several else [self.prompt]

    def texts(self) -> list[Sampling]:
        return self.samplings(self.max_tokens, self.logprobs)


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[Part] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or "", **(self.model_extra or {})}


class ChatBody(Body):
    """POST /v1/chat/completions"""

    kind: ClassVar[str] = "chat.completion"

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[Message]) -> list[Message]:
        if not messages:
            raise ValueError("must hold at least one message")
        return messages

    def texts(self) -> list[Sampling]:
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs needs logprobs to be true")
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.samplings(asked, (self.top_logprobs or 0) if self.logprobs else None)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


@dataclass
class Answer:
    """Writes the answers to one request: `whole`, or in `chunk`s.

    Args:
        kind: of `CompletionBody` or `ChatBody`.
        model: the name to give.
        spell: the text of a token on its own, and whether it is whole characters.
    """

    kind: str
    model: str
    spell: Callable[[int], tuple[str, bool]]

    def __post_init__(self):
        self.chat = self.kind == ChatBody.kind
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": self.model,
        }
        self._lengths: dict[int, int] = {}  # characters that each text has by now

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(completions):
            text = {"message": {"role": "assistant", "content": completion.text}}
            choices.append(
                {
                    "index": index,
                    **(text if self.chat else {"text": completion.text}),
                    "logprobs": self._logprobs(completion.logprobs, index),
                    "finish_reason": FINISH_REASONS[completion.finish_reason],
                }
            )
        return {**self.head, "choices": choices}

    def chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            text = {"delta": {**delta, "content": piece.text} if piece.text or first else delta}
        else:
            text = {"text": piece.text}
        logprobs = self._logprobs(piece.logprobs, index)
        reason = None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason]
        return self._chunk([{"index": index, **text, "logprobs": logprobs, "finish_reason": reason}])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.kind + ".chunk" if self.chat else self.kind, "choices": choices}

    def _logprobs(self, steps: tuple[Logprobs, ...], index: int) -> dict[str, Any] | None:
        if not steps:
            return None
        if self.chat:
            content = []
            for step in steps:
                top = [self._token(*pair) for pair in step.likeliest]
                content.append({**self._token(step.token, step.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        tokens = [self.spell(step.token)[0] for step in steps]
        offsets = []
        for token in tokens:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(step.logprob) for step in steps],
            "top_logprobs": [
                {self.spell(token)[0]: _finite(logprob) for token, logprob in step.likeliest} for step in steps
            ],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, whole = self.spell(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    message = message.encode(errors="backslashreplace").decode()  # it may quote what is no Unicode
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
