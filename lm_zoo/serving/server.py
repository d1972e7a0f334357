"""An engine behind a port, until a signal ends it: texts that are being written get time to finish."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn

from lm_zoo.errors import UserError
from lm_zoo.serving.app import create_app
from lm_zoo.serving.engine import Engine

LAST_WORDS = 5  # seconds to send what was written, once all texts have ended


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; UserError where another program has it or it is not this machine's."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; name another one with --port") from error
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}; check --host and --port") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, but that a signal lets the engine finish first, for `grace` seconds; a second one does not wait.

    Until then connections are still taken: new texts are refused with status 503, and /health says so.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[], None]):
        super().__init__(config)
        self.engine = engine
        self.grace = grace
        self.ready = ready
        self.interrupted = False  # by Ctrl-C

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, number: int, frame: object) -> None:
        self.interrupted |= number == signal.SIGINT
        grace = 0.0 if self.engine.closing else self.grace
        threading.Thread(target=self.finish, args=(grace,), daemon=True).start()

    def finish(self, grace: float) -> None:
        self.engine.close(grace)
        self.should_exit = True


def serve(
    engine: Engine,
    name: str,
    listener: socket.socket,
    *,
    api_key: str | None = None,
    grace: float = 30.0,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; KeyboardInterrupt after the latter."""
    server = Server(
        uvicorn.Config(
            create_app(engine, name, api_key=api_key),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=LAST_WORDS,
        ),
        engine,
        grace,
        ready,
    )
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()
    if server.interrupted:
        raise KeyboardInterrupt
