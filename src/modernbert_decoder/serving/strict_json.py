"""Bodies as JSON, strictly: UTF-8, no NaN or Infinity, no numbers beyond float64, nothing else.

This module knows bytes and content types; what a body means is the protocol's business.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, Final, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from modernbert_decoder.serving.errors import ApiError

# Reading a body holds Python's lock, and so everybody's streams: what no request needs is refused before that
# by its number. Texts and token ids are what large bodies consist of.
_MAX_CONTAINERS: Final = 1 << 16
_MAX_VALUES: Final = 1 << 18
# Larger bodies are read on a thread.
_LARGE: Final = 1 << 16
# Python takes time that grows with the square of their number; no integer of float64 has as many digits.
_MAX_DIGITS: Final = 309
_MANY_DIGITS: Final = b"0" * (_MAX_DIGITS + 1)
_DIGITS_AS_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> Any:
    """The value that a body spells.

    Raises:
        ApiError: 400, it is not JSON, or no request has so many parts.
    """
    _require_few_parts(body)
    # Looking at every integer takes longer than reading them: only where some run of digits asks for it.
    parse_int = _short if _MANY_DIGITS in body.translate(_DIGITS_AS_ZEROS) else int
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_refuse, parse_float=_finite, parse_int=parse_int
        )
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except ValueError as error:  # of the functions below
        raise _not_json(str(error)) from None
    if _SURROGATE.search(body):
        _require_text(value)
    return value


def _require_few_parts(body: bytes) -> None:
    """Refuses bodies of very many parts, whatever they are.

    Raises:
        ApiError: 400.
    """
    if _num_parts(body) <= _MAX_CONTAINERS and body.count(b",") < _MAX_VALUES:
        return
    # Signs inside of texts do not count: what is left are the parts between quotation marks, every other one.
    marked = body.replace(rb"\\", b"").replace(rb"\"", b"")
    # A text is a name, behind a comma or the first value of something.
    is_of_many_texts = marked.count(b'"') > 2 * (_MAX_VALUES + 2 * _MAX_CONTAINERS)
    outside = b"" if is_of_many_texts else b'"'.join(marked.split(b'"')[::2])
    if _num_parts(outside) > _MAX_CONTAINERS:
        what = f"{_MAX_CONTAINERS:,} lists, objects and fields"
    elif is_of_many_texts or outside.count(b",") >= _MAX_VALUES:
        what = f"{_MAX_VALUES:,} values"
    else:
        return
    raise ApiError(400, f"the body has more than {what}, which no request needs", code="invalid_value")


def _num_parts(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")


def _require_text(value: Any) -> None:
    """Refuses halves of surrogate pairs, which JSON can spell and which are no text.

    Raises:
        ApiError: 400, with the field of an object that has one.
    """
    parts = value.items() if isinstance(value, dict) else [(None, value)]
    for name, part in parts:
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            param = name if isinstance(name, str) and name.isprintable() else None
            raise ApiError(
                400,
                f"{param or 'the body'}: text must be valid Unicode, without halves of surrogate pairs",
                param=param,
                code="invalid_value",
            ) from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _short(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer has more than {_MAX_DIGITS} digits")
    return int(digits)


def _not_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


class _StrictRequest(Request):
    """A request whose `json` is `parse_json`."""

    async def json(self) -> Any:
        """The body's value."""
        body = await self.body()
        return parse_json(body) if len(body) <= _LARGE else await asyncio.to_thread(parse_json, body)


class StrictJsonRoute(APIRoute):
    """A route that takes its body as JSON in UTF-8 and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The usual handler behind the checks."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None:
                _require_json(request)
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


def _require_json(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    if header.get_content_type() != "application/json":
        raise ApiError(
            415,
            "the body must be JSON; say so with the header `Content-Type: application/json`",
            code="unsupported_media_type",
        )
    charset = header.get_content_charset("utf-8")
    if charset.lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "the body must be JSON in UTF-8", code="unsupported_media_type")
