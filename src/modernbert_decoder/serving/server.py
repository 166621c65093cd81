"""Running the server: sockets, signals, logs, and an end that lets running requests finish.

This module knows uvicorn; what is served is the application's business.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn

import uvicorn
from fastapi import FastAPI

from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.access_log import LogFormatter, RequestLog
from modernbert_decoder.serving.app import create_app
from modernbert_decoder.serving.connections import impatient_protocol
from modernbert_decoder.serving.context import ServerContext
from modernbert_decoder.serving.models import State
from modernbert_decoder.serving.settings import ServerSettings, is_loopback, socket_family

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_LOGGERS: Final = ("modernbert_decoder", "uvicorn")
# For answers that were ended to reach their clients, behind the time that running requests have.
_FAREWELL_SECONDS: Final = 5
# For requests that did not even end then to be cut off, and logged.
_CANCELLING_SECONDS: Final = 1
_WATCH_SECONDS: Final = 0.1
_KEEP_ALIVE_SECONDS: Final = 75
_log = logging.getLogger(__name__)


class ApiServer(uvicorn.Server):
    """Serves an application of `create_app`, and drains it before it stops.

    Args:
        app: the application.
        announce: called with the address once requests are accepted.
        when_ready: called once all models are loaded.
        when_stuck: called with the names of models whose step does not end, once the server was told to stop
            and everything else has had its time; without it the server waits for that step.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        announce: Callable[[str, int], None] | None = None,
        when_ready: Callable[[], None] | None = None,
        when_stuck: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        context = app.state.context
        log = app.state.request_log
        assert isinstance(context, ServerContext)
        assert isinstance(log, RequestLog)
        self._context = context
        self._announce = announce
        self._when_ready = when_ready
        self._when_stuck = when_stuck
        settings = context.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=impatient_protocol(
                    head_seconds=settings.body_timeout, write_seconds=settings.write_timeout, log=log
                ),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.grace) + _FAREWELL_SECONDS,
                backlog=2048,
            )
        )

    @property
    def failure(self) -> Exception | None:
        """Why a model could not be opened."""
        return self._context.registry.failure

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the server; other than uvicorn, it does not die of them afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the sockets; models are opened meanwhile."""
        await super().startup(sockets)
        if self.started and self._announce is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(host, port)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._when_ready is not None and self._context.registry.state is State.READY:
            self._when_ready()
            self._when_ready = None
        return await super().on_tick(counter) or self._context.registry.state is State.FAILED

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, and gives running requests their time."""
        settings, registry = self._context.settings, self._context.registry
        _log.info("shutting down; running requests have %g seconds", settings.grace)
        watching = asyncio.ensure_future(self._watch_steps())
        draining = asyncio.ensure_future(registry.drain(0 if self.force_exit else settings.grace))
        try:
            await super().shutdown(sockets)
            if self.force_exit:  # asked for a second time, which takes the time away
                await registry.drain(0)
            await draining
        finally:
            watching.cancel()

    async def _watch_steps(self) -> None:
        """Looks for steps that do not end, once requests have had their time and answers were sent."""
        if self._when_stuck is None:
            return
        settings, registry = self._context.settings, self._context.registry
        end = time.monotonic() + settings.grace
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_WATCH_SECONDS)
        await asyncio.sleep(_FAREWELL_SECONDS + _CANCELLING_SECONDS)
        while not (stuck := registry.stalled(min(settings.step_timeout, _FAREWELL_SECONDS))):
            await asyncio.sleep(_WATCH_SECONDS)
        self._when_stuck(stuck)


def run(settings: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM; ends the process itself where a step keeps it from ending.

    Raises:
        UserError: a model cannot be opened, or the address cannot be used.
    """
    set_up_logging(settings.log_format)

    def announce(host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(source.name for source in settings.models)
        _log.info("listening on http://%s:%d; loading %s", shown, port, names)
        if not settings.api_keys and not is_loopback(host):
            _log.warning("no API key is set: everybody who reaches this address can use the server")

    server = ApiServer(
        create_app(settings),
        announce=announce,
        when_ready=set_aside_what_stays,
        when_stuck=_end_process,
    )
    listening = _bound_socket(settings)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if server.failure is not None:
        raise server.failure


def _end_process(stuck: Sequence[str]) -> NoReturn:
    """Ends the process with its threads, one of which would be waited for without end."""
    _log.error("a step of %s does not end; the process ends without it", ", ".join(stuck))
    logging.shutdown()
    os._exit(1)


def _bound_socket(settings: ServerSettings) -> socket.socket:
    bound = socket.socket(socket_family(settings.host), socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except (OSError, OverflowError, UnicodeError) as error:  # the last one of what is no name at all
        bound.close()
        raise InputError(f"cannot listen on {settings.host} port {settings.port}: {error}") from None
    return bound


def set_aside_what_stays() -> None:
    """Spares the garbage collector what is there now: modules and models, which stay to the end.

    It stops every thread while it looks through everything, again and again, and that is most of it.
    """
    gc.collect()
    gc.freeze()


def set_up_logging(log_format: str) -> None:
    """Sends the server's log to standard error.

    Args:
        log_format: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(is_json=log_format == "json"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        # uvicorn's own news repeat ours, and its warnings are of what clients send, which has lines of ours.
        logger.setLevel(logging.ERROR if name == "uvicorn" else logging.INFO)
