"""What every request has to pass before it is looked at: the key, the size, and whether the server is closing."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

from lm_zoo.serving.protocol import error_body

DRAINED = 2**26  # bytes of a body that is refused which are read all the same, so that the client reads the answer
BODY_SECONDS = 60.0  # for a client to send its body

Receive = Callable[[], Any]


class Guard:
    """An ASGI application around another one.

    Args:
        app: the other.
        api_key: what paths under /v1 need as "Authorization: Bearer KEY"; `None`: nothing.
        max_body: bytes that the body of a request may have.
        closing: whether the server takes no more requests.
        count: called with path and status of every answer.
    """

    def __init__(
        self,
        app: Callable,
        *,
        api_key: str | None,
        max_body: int,
        closing: Callable[[], bool],
        count: Callable[[str, int], None],
    ):
        self.app = app
        self.api_key = None if api_key is None else api_key.encode()
        self.max_body = max_body
        self.closing = closing
        self.count = count

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        if scope["path"].startswith("/v1"):
            if not self._has_key(scope):
                error = error_body("wrong or missing API key", "invalid_request_error", "invalid_api_key")
                return await self._refuse(401, error, receive, counted, {"www-authenticate": "Bearer"})
            if self.closing():
                error = error_body("the server is closing", "server_error", "closing")
                return await self._refuse(503, error, receive, counted, {"retry-after": "10"})
        body, status = await self._body(receive)
        if body is None:
            if status is None:
                return None  # the client has gone
            message = {408: "the body took too long to come", 413: f"the body is larger than {self.max_body} bytes"}
            error = error_body(message[status], "invalid_request_error", "request_too_large" if status == 413 else None)
            return await self._refuse(status, error, receive, counted)
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return unread.pop() if unread else await receive()

        try:
            return await self.app(scope, replay, counted)
        except Exception:
            self.count(scope["path"], 500)
            raise

    def _has_key(self, scope: dict[str, Any]) -> bool:
        if self.api_key is None:
            return True
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        return hmac.compare_digest(given, b"Bearer " + self.api_key)

    async def _body(self, receive: Receive) -> tuple[bytes | None, int | None]:
        """The whole body; or `None` and the status to refuse it with, if anybody is there to be told."""
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    size += len(message.get("body", b""))
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size > self.max_body:
                        return None, 413
        except TimeoutError:
            return None, 408
        return b"".join(parts), None

    async def _refuse(
        self,
        status: int,
        error: dict[str, Any],
        receive: Receive,
        send: Callable,
        headers: dict[str, str] | None = None,
    ) -> None:
        if status != 408:
            await self._drain(receive)
        body = json.dumps(error).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
        headers["connection"] = "close"
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async def _drain(self, receive: Receive) -> None:
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while size < DRAINED:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return
