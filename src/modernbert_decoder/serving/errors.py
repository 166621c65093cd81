"""What is answered when a request cannot be: every error as OpenAI's clients read it, with a status code.

This module knows HTTP and the engine's error classes; it does not know what requests mean.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from modernbert_decoder.errors import (
    EngineClosedError,
    EngineFailedError,
    InputError,
    QueueFullError,
    RequestTimeoutError,
    UserError,
)

ERROR_LOGGER: Final = "modernbert_decoder.serving.error"
_KINDS: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The kind of pydantic's finding about an object as a whole.
TOO_MANY_FIELDS: Final = "too_many_fields"
_INVALID: Final = "invalid_request_error"
_RETRY_SECONDS: Final = 2
# Characters of a message, and of what it quotes of a request: neither may be as long as the client likes.
_MAX_MESSAGE: Final = 1_000
_MAX_QUOTED: Final = 100
_ENGINE_ERRORS: Final = (UserError, QueueFullError, RequestTimeoutError, EngineClosedError, EngineFailedError)


def shortened(text: str, most: int = _MAX_QUOTED) -> str:
    """A text that a client sent, or that may quote one, no longer than it takes to recognize it.

    >>> shortened("abcdefgh", 4)
    'abcd...'
    """
    return text if len(text) <= most else text[:most] + "..."


class ApiError(HTTPException):
    """An answer other than the one wished for.

    Attributes:
        message: for people.
        param: the field of the request that is at fault.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = shortened(message, _MAX_MESSAGE)
        super().__init__(status, message, headers)
        self.message = message
        self.param = None if param is None else shortened(param, _MAX_QUOTED)
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _KINDS.get(self.status_code, _INVALID if self.status_code < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole answer. ASCII, since a message may quote text that is not valid Unicode."""
        return Response(
            json.dumps(self.body),
            status_code=self.status_code,
            headers=dict(self.headers or {}),
            media_type="application/json",
        )


def not_ready(message: str) -> ApiError:
    """The server starts or stops."""
    return ApiError(503, message, code="not_ready", headers={"Retry-After": str(_RETRY_SECONDS)})


def server_error() -> ApiError:
    """A defect of ours; what it was is in the log only."""
    return ApiError(500, "the server failed to answer this request; its log says why", code="server_error")


def as_api_error(error: BaseException, fields: Iterable[str] = ()) -> ApiError | None:
    """What an error of the engine means to the client; None for a defect.

    Args:
        error: as raised by the engine.
        fields: names of the request's fields, one of which the error's message may name.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, InputError):
        return ApiError(400, message, param=parameter_named(message, fields))
    if isinstance(error, QueueFullError):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return ApiError(429, message, code="queue_full", headers={"Retry-After": seconds})
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, message, code="timeout")
    if isinstance(error, EngineClosedError):
        return not_ready(message)
    if isinstance(error, EngineFailedError):
        return ApiError(
            500, "a step of the engine failed and ended this request; try again", code="engine_failed"
        )
    if isinstance(error, UserError):  # a damaged checkpoint, which is no fault of the client's
        return ApiError(500, message, code="model_error")
    return None


def log_defect(error: BaseException, request_id: str) -> None:
    """Logs a defect that a request met; the log's format leaves out its message, which may quote a prompt."""
    logging.getLogger(ERROR_LOGGER).error("request %s failed", request_id, exc_info=error)


def parameter_named(message: str, fields: Iterable[str]) -> str | None:
    """The field that a message names first.

    >>> parameter_named("the prompt has 9 tokens and max_tokens is 16", ["max_tokens", "prompt"])
    'prompt'
    """
    known = set(fields)
    return next((word[0] for word in re.finditer(r"\w+", message) if word[0] in known), None)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's findings; it quotes nothing of what was sent but names of fields."""
    first = errors[0]
    path = [part for part in first["loc"][1:] if isinstance(part, str | int)]
    param = str(path[0]) if path else None
    if first["type"] == "missing" and param:
        return ApiError(400, f"{_spelled(path)} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter {_spelled(path)}", param=param, code="unknown_parameter")
    where = f"{param}: " if param else ""
    if param is None and first["loc"][0] == "body" and first["type"] != TOO_MANY_FIELDS:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, where + str(first["msg"]), param=param, code="invalid_value")


def _spelled(path: Sequence[str | int]) -> str:
    return shortened(".".join(shortened(str(part)) for part in path))


def install_handlers(app: FastAPI, fields_of: Callable[[Request], Iterable[str]]) -> None:
    """Makes an `ApiError` of every error that a route or the router raises, defects excepted.

    Args:
        app: to install them in.
        fields_of: gives the names of a request's fields.
    """

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return _http_error(request, error).response()

    async def engine_error(request: Request, error: Exception) -> Response:
        answer = as_api_error(error, fields_of(request))
        assert answer is not None
        return answer.response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, http_error)
    for kind in (ApiError, *_ENGINE_ERRORS):
        app.add_exception_handler(kind, engine_error)


def _http_error(request: Request, error: StarletteHTTPException) -> ApiError:
    status = error.status_code
    messages = {
        404: "there is nothing at this path; /openapi.json lists what there is",
        405: f"this path does not take {request.method}",
    }
    message = messages.get(status, str(error.detail or HTTPStatus(status).phrase))
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    return ApiError(status, message, code=codes.get(status), headers=dict(error.headers or {}))
