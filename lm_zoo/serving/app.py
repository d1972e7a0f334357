"""The OpenAI protocol over an engine, as a FastAPI application."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from lm_zoo.errors import UserError
from lm_zoo.serving.engine import Engine, PromptTooLong
from lm_zoo.serving.guard import Guard
from lm_zoo.serving.metrics import Metrics
from lm_zoo.serving.protocol import Answer, ChatBody, CompletionBody, error_body, usage
from lm_zoo.serving.request import Closed, Completion, EngineError, Piece, QueueFull, Request
from lm_zoo.serving.sampling import Sampling
from lm_zoo.serving.text import UNFINISHED

BYTES_PER_TOKEN = 16  # of a body, at most: characters outside of ASCII may be escaped
BODY = 2**20  # bytes of a body beside that
CLIENT_GONE = 499
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(engine: Engine, name: str, *, api_key: str | None = None) -> FastAPI:
    """The application that serves the model of `engine` as `name`."""
    app = FastAPI(title="lm-zoo serve", description=f"The OpenAI protocol for {name}")
    created = int(time.time())
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"}
    metrics = Metrics(engine, paths)
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_body=BODY + BYTES_PER_TOKEN * engine.max_prompt_tokens,
        closing=lambda: engine.closing,
        count=metrics.count,
    )
    _add_error_handlers(app)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HTTPRequest) -> Response:
        _check_model(body.model, name)
        texts = Texts(engine, metrics)
        await texts.submit(body.prompts, body.texts())
        return await _answer(body, texts, Answer(body.kind, name, _spell(engine)), http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        _check_model(body.model, name)
        samplings = body.texts()
        ids = await run_in_threadpool(engine.encode_chat, [message.for_template() for message in body.messages])
        texts = Texts(engine, metrics)
        await texts.submit([ids], samplings)
        return await _answer(body, texts, Answer(body.kind, name, _spell(engine)), http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, created)]}

    @app.get("/v1/models/{wanted:path}")
    async def model(wanted: str) -> dict[str, Any]:
        _check_model(wanted, name)
        return _model(name, created)

    @app.get("/health")
    async def health() -> Response:
        status = "closing" if engine.closing else "ok" if engine.alive else "stopped"
        content = {"status": status, "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(content, status_code=200 if status == "ok" else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.page(), media_type=PROMETHEUS)

    return app


class Texts:
    """The texts of one HTTP request, whose pieces come from the engine's thread into this one."""

    def __init__(self, engine: Engine, metrics: Metrics):
        self.engine = engine
        self.metrics = metrics
        self.requests: list[Request] = []
        self.prompt_tokens = 0
        self.start = time.monotonic()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._left = 0  # texts that are not finished
        self._first = True

    async def submit(self, prompts: list[str | list[int]], samplings: list[Sampling]) -> None:
        """A text for every prompt and sampling: all of them, or none and an error."""
        self._left = len(prompts) * len(samplings)
        await run_in_threadpool(self._submit, prompts, samplings)

    def _submit(self, prompts: list[str | list[int]], samplings: list[Sampling]) -> None:
        try:
            for prompt in prompts:
                ids = self.engine.encode(prompt) if isinstance(prompt, str) else prompt
                self.prompt_tokens += len(ids)
                for sampling in samplings:
                    listener = self._listener(len(self.requests))
                    self.requests.append(self.engine.submit(ids, sampling, listener=listener))
        except BaseException:
            self.cancel()
            raise

    def _listener(self, index: int):
        return lambda piece: self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    async def next(self) -> dict[int, Piece]:
        """What has come since the last call, or comes next, by text; empty when all are finished."""
        if self._left == 0:
            return {}
        found: dict[int, Piece] = {}
        pieces = [await self._pieces.get()]
        while not self._pieces.empty():
            pieces.append(self._pieces.get_nowait())
        for index, piece in pieces:
            if piece.error is not None:
                raise piece.error
            if piece.finish_reason == "timeout" and self.requests[index].written == 0:
                raise Closed("no token was written in the time that a request has; try again later")
            found[index] = found[index].followed_by(piece) if index in found else piece
            self._left -= piece.finish_reason is not None
        if self._first:
            self.metrics.first_token.observe(time.monotonic() - self.start)
            self._first = False
        if self._left == 0:
            self.metrics.seconds.observe(time.monotonic() - self.start)
        return found

    def cancel(self) -> None:
        for request in self.requests:
            self.engine.cancel(request)

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.prompt_tokens, sum(request.written for request in self.requests))


async def _answer(body: CompletionBody | ChatBody, texts: Texts, answer: Answer, http: HTTPRequest) -> Response:
    """The answer as a whole or as a stream. A client that goes away takes its texts with it."""
    work = asyncio.ensure_future(texts.next() if body.stream else _all(texts))
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_GONE)
        found = work.result()
        if body.stream:
            events = _events(body, texts, answer, found)
            stream = StreamingResponse(events, media_type="text/event-stream", background=BackgroundTask(texts.cancel))
            stream.headers["cache-control"] = "no-cache"
            texts = None  # is the stream's now
            return stream
        return JSONResponse({**answer.whole(found), "usage": texts.usage})
    finally:
        work.cancel()
        gone.cancel()
        if texts is not None:
            texts.cancel()


async def _all(texts: Texts) -> list[Completion]:
    pieces: list[list[Piece]] = [[] for _ in texts.requests]
    while found := await texts.next():
        for index, piece in found.items():
            pieces[index].append(piece)
    return [Completion.of(mine, len(request.ids)) for mine, request in zip(pieces, texts.requests, strict=True)]


async def _events(
    body: CompletionBody | ChatBody, texts: Texts, answer: Answer, found: dict[int, Piece]
) -> AsyncIterator[bytes]:
    begun = set()
    try:
        while found:
            chunks = []
            for index, piece in found.items():
                first = index not in begun
                if first or piece.text or piece.finish_reason or piece.logprobs:
                    chunks.append(answer.chunk(index, piece, first))
                    begun.add(index)
            yield b"".join(map(_event, chunks))
            found = await texts.next()
        if body.with_usage:
            yield _event(answer.usage_chunk(texts.usage))
        yield b"data: [DONE]\n\n"
    except EngineError as error:  # it is too late for a status
        yield _event(_error_of(error)[1])
    finally:
        texts.cancel()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_model(wanted: str, name: str) -> None:
    if wanted != name:
        message = f"no model {wanted[:100]!r} here, but {name!r}"
        raise HTTPException(404, error_body(message, "invalid_request_error", "model_not_found", "model"))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lm_zoo"}


def _spell(engine: Engine) -> Callable[[int], tuple[str, bool]]:
    """The text of a token on its own, and whether it is whole characters; if not, as the vocabulary has it."""

    def spell(token: int) -> tuple[str, bool]:
        text = engine.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        whole = UNFINISHED not in text
        return (text if whole else str(engine.tokenizer.convert_ids_to_tokens(token))), whole

    return spell


def _error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for what an engine raises."""
    if isinstance(error, PromptTooLong):
        return 400, error_body(str(error), "invalid_request_error", "context_length_exceeded")
    if isinstance(error, ValueError | TypeError):
        field = str(error).split()[0]
        known = field in CompletionBody.model_fields or field in ChatBody.model_fields
        return 400, error_body(str(error), "invalid_request_error", param=field if known else None)
    if isinstance(error, QueueFull):
        return 429, error_body(str(error), "rate_limit_error", "queue_full")
    if isinstance(error, Closed):
        return 503, error_body(str(error), "server_error", "closing")
    return 500, error_body(str(error), "server_error")


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is an object of the protocol with a status of its own."""

    @app.exception_handler(EngineError)
    @app.exception_handler(UserError)
    async def of_the_engine(_: HTTPRequest, error: Exception) -> Response:
        status, content = _error_of(error)
        return JSONResponse(content, status, {"retry-after": "1"} if status in (429, 503) else None)

    @app.exception_handler(RequestValidationError)
    async def of_the_body(_: HTTPRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_attributes_type" and not where:
            message = "the body must be a JSON object, sent with Content-Type: application/json"
        message = f"{where}: {message}" if where else message
        if first["type"] == "json_invalid":
            message, where = f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", ""
        return JSONResponse(error_body(message, "invalid_request_error", param=where or None), 400)

    @app.exception_handler(StarletteHTTPException)
    async def of_http(_: HTTPRequest, error: StarletteHTTPException) -> Response:
        content = error.detail
        if not isinstance(content, dict):
            content = error_body(str(content), "invalid_request_error")
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def of_ours(_: HTTPRequest, error: Exception) -> Response:
        return JSONResponse(error_body("the server made a mistake", "server_error"), 500)
