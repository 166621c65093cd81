"""One line per request in the log, and an answer for every request, whatever fails on the way.

Requests are counted by endpoint, those too that never reach one. A line has numbers and names, never text of
a prompt or completion; that is also why a defect is logged with the places it came through, but without its
message, which may quote what a client sent.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modernbert_decoder.serving.context import RequestRecord, set_record
from modernbert_decoder.serving.errors import log_defect, server_error
from modernbert_decoder.serving.metrics import Metrics
from modernbert_decoder.serving.sse import ClientGoneError

ACCESS_LOGGER: Final = "modernbert_decoder.serving.access"
# What nginx logs for a client that closed its connection before it was answered.
CLIENT_GONE: Final = 499
_UNKNOWN_ENDPOINT: Final = "other"


class RequestLog:
    """Counts requests that have ended, and writes their lines.

    Args:
        metrics: of the server.
        endpoint_of: gives the documented path of the endpoint that a path leads to, None where to none.
    """

    def __init__(self, metrics: Metrics, *, endpoint_of: Callable[[str], str | None]) -> None:
        self._metrics = metrics
        self._endpoint_of = endpoint_of
        self._access = logging.getLogger(ACCESS_LOGGER)

    def ended(self, record: RequestRecord, *, method: str | None, path: str, status: int) -> None:
        """One request, answered or not."""
        endpoint = self._endpoint_of(path) or _UNKNOWN_ENDPOINT
        self._metrics.request_ended(endpoint=endpoint, status=status, seconds=record.seconds)
        first = record.first_token_seconds
        fields = {
            "request_id": record.request_id,
            "client": record.client,
            "method": method,
            "endpoint": endpoint,
            "status": status,
            "model": record.model,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "finish_reason": ",".join(record.finish_reasons) or None,
            "error": record.error,
            "first_token_ms": None if first is None else round(first * 1e3, 1),
            "ms": round(record.seconds * 1e3, 1),
        }
        self._access.info("request", extra={"fields": {k: v for k, v in fields.items() if v is not None}})


class AccessLog:
    """The outermost layer: gives requests their ids and records, and has them logged.

    Args:
        app: what is behind.
        log: of the server.
    """

    def __init__(self, app: ASGIApp, *, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = new_record(scope.get("client"))
        set_record(scope, record)
        status = CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", record.request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGoneError:
            pass
        except Exception as error:
            log_defect(error, record.request_id)
            if status == CLIENT_GONE:
                await server_error().response()(scope, receive, noting)
        finally:
            self._log.ended(record, method=scope["method"], path=scope["path"], status=status)


def new_record(address: tuple[str, int] | None) -> RequestRecord:
    """Of a request that comes from there, as far as that is an address: a client may state another one."""
    host = address[0].partition("%")[0] if address else ""
    try:
        client = str(ipaddress.ip_address(host))
    except ValueError:
        client = "unknown"
    return RequestRecord(uuid.uuid4().hex, client)


class LogFormatter(logging.Formatter):
    """One line per record: `time level message name=value ...`, or one JSON object.

    Of an exception it tells the class and the places it came through, not the message.

    Args:
        is_json: which of the two.
    """

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """The line; line breaks inside a message stay inside it only in JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{moment}.{int(record.msecs):03}Z"
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = record.exc_info[0].__name__
            fields["places"] = _places(record.exc_info[2])
        if self._is_json:
            head = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
            return json.dumps(head | fields)
        values = " ".join(f"{name}={_spelled(value)}" for name, value in fields.items())
        return f"{stamp} {record.levelname.lower()} {record.getMessage()} {values}".rstrip()


def _places(trace: TracebackType | None) -> list[str]:
    """`file:line function` of every frame, the innermost last."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]


def _spelled(value: object) -> str:
    """A value as one word; quoted where it could be taken for something else."""
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if is_plain else json.dumps(text)
