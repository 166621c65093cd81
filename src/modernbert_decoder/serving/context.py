"""What the parts of the server share: settings, models and metrics, and what is noted of each request.

A request's record has numbers and names only, never text of its prompt or completion.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import Request

from modernbert_decoder.serving.metrics import Metrics
from modernbert_decoder.serving.models import Registry
from modernbert_decoder.serving.settings import ServerSettings

_RECORD: Final = "modernbert_decoder.record"


@dataclass(frozen=True)
class ServerContext:
    """One server's parts."""

    settings: ServerSettings
    registry: Registry
    metrics: Metrics


@dataclass
class RequestRecord:
    """What is known of one request when it has ended.

    Attributes:
        request_id: also sent to the client.
        client: who is treated as one in the queue: an API key, the request's `user`, or an address.
        has_key: whether `client` is an API key.
        fields: names of the body's fields.
    """

    request_id: str
    client: str
    has_key: bool = False
    fields: frozenset[str] = frozenset()
    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None
    finish_reasons: tuple[str, ...] = ()
    error: str | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the request arrived."""
        return time.perf_counter() - self.started


def set_record(scope: MutableMapping[str, Any], record: RequestRecord) -> None:
    """Puts the record where `record_of` finds it."""
    scope[_RECORD] = record


def record_in(scope: Any) -> RequestRecord:
    """The record of the request with this ASGI scope."""
    record = scope[_RECORD]
    assert isinstance(record, RequestRecord)
    return record


def record_of(request: Request) -> RequestRecord:
    """The record of a request."""
    return record_in(request.scope)


def context_of(request: Request) -> ServerContext:
    """The server that a request came to."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context
