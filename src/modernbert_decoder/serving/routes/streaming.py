"""Answers of the endpoints that complete: one JSON value, or a stream of events that always ends well."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

from fastapi import Response
from pydantic import BaseModel

from modernbert_decoder.serving.context import RequestRecord
from modernbert_decoder.serving.errors import as_api_error, log_defect, server_error
from modernbert_decoder.serving.sse import DONE, EventStream, event

STREAM_OR: Final[Mapping[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer, or with `stream` its chunks as server-sent events: `data: ` and a JSON "
        "value, and `data: [DONE]` at the end. An error after the first chunk is the last value.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def json_response(reply: BaseModel) -> Response:
    """A whole answer."""
    return Response(reply.model_dump_json(), media_type="application/json")


def stream_response(events: AsyncGenerator[dict[str, Any], None], record: RequestRecord) -> EventStream:
    """A stream of events, the last of which says that it is the last, or what went wrong."""
    return EventStream(_encoded(events, record))


async def _encoded(
    events: AsyncGenerator[dict[str, Any], None], record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for data in events:
                yield event(data)
        except Exception as error:
            answer = as_api_error(error)
            if answer is None:
                log_defect(error, record.request_id)
                answer = server_error()
            record.error = answer.code
            yield event(answer.body)
        yield DONE
