"""How every request for a model begins, and what its endpoint may answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request

from modernbert_decoder import __version__
from modernbert_decoder.serving.context import RequestRecord, context_of, record_of
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.models import ServedModel
from modernbert_decoder.serving.protocol.base import Body, ErrorReply

_REASONS: Final = {
    400: "The body is not JSON, or says something that cannot be done; `param` names the field.",
    401: "There is no API key, or a wrong one.",
    403: "`Host` is none of the server's names.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "Too many requests wait; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The server starts or shuts down; `Retry-After` says when to try again.",
    504: "The request took longer than the server allows.",
}
_RETRY: Final = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """What the OpenAPI document says of these errors."""
    return {
        status: {
            "model": ErrorReply,
            "description": _REASONS[status],
            **({"headers": _RETRY} if status in (429, 503) else {}),
        }
        for status in statuses
    }


BODY_ERRORS: Final[Mapping[int | str, dict[str, Any]]] = errors(
    400, 401, 403, 404, 408, 413, 415, 429, 500, 503
)
COMPUTING_ERRORS: Final[Mapping[int | str, dict[str, Any]]] = {**BODY_ERRORS, **errors(504)}


def begin(request: Request, body: Body, *, model: str | None, user: str | None, needs: str) -> ServedModel:
    """Finds the model of a request and notes who asks for what.

    Args:
        request: that came.
        body: its body.
        model: name of the model; None is the first one.
        user: on whose behalf, as the client says.
        needs: the capability that is asked for.

    Raises:
        ApiError: there is no such model, it is not ready, or it cannot do this.
    """
    record = record_of(request)
    record.fields = frozenset(type(body).model_fields)
    if user and not record.has_key:
        record.client = f"user-{user}"
    served = context_of(request).registry.get(model)
    record.model = served.name
    if needs not in served.capabilities:
        raise ApiError(
            400,
            f"the model {served.name!r} cannot be used for {needs}; it can be used for "
            f"{', '.join(served.capabilities)}",
            param="model",
            code="unsupported_by_model",
        )
    return served


def fields_of(request: Request) -> frozenset[str]:
    """Names of the fields of a request's body, once it has begun."""
    return record_of(request).fields


def answer_id(prefix: str, record: RequestRecord) -> str:
    """The id of an answer; the part behind the prefix is the request's."""
    return f"{prefix}-{record.request_id}"


def fingerprint(model: ServedModel) -> str:
    """What the answer depends on besides the request: the release and the weights' format."""
    return f"mbd-{__version__}-{model.llm.formats}"
