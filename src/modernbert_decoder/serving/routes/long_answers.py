"""Answers of very many parts: made and spelled on a thread, so that the event loop goes on meanwhile.

What holds Python's lock from its beginning to its end is done in pieces, between which others have their
turn. This module knows lists and models of pydantic; what they say is the routes' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from fastapi import Response
from pydantic import BaseModel
from pydantic_core import to_json

from modernbert_decoder.serving.routes.streaming import json_response

Result = TypeVar("Result")

# Fewer are done with faster than a thread is asked to.
_FEW_ITEMS: Final = 2_000
_ITEMS_OF_A_PIECE: Final = 256


async def made(make: Callable[[], Result], *, num_items: int) -> Result:
    """What `make` gives; it is called on a thread where it makes many items."""
    return make() if num_items <= _FEW_ITEMS else await asyncio.to_thread(make)


async def long_json_response(reply: BaseModel, *, num_items: int) -> Response:
    """A whole answer of about so many numbers and texts."""
    if num_items <= _FEW_ITEMS:
        return json_response(reply)
    content = await asyncio.to_thread(lambda: b"".join(_pieces(reply, depth=0)))
    return Response(content, media_type="application/json")


def _pieces(value: Any, *, depth: int) -> Iterator[bytes]:
    """The JSON of an answer, of its items, and of what these hold."""
    if isinstance(value, BaseModel):
        sign = b"{"
        for name, part in value:
            yield sign + b'"' + name.encode() + b'":'
            yield from _pieces(part, depth=depth)
            sign = b","
        yield b"}"
    elif isinstance(value, list) and value:
        sign = b"["
        for piece in _pieces_of_list(value, depth=depth):
            yield sign + piece
            sign = b","
        yield b"]"
    else:
        yield _json(value)


def _pieces_of_list(values: Sequence[Any], *, depth: int) -> Iterator[bytes]:
    """Its items, or some of them at a time."""
    if depth == 0 and isinstance(values[0], BaseModel):
        for value in values:
            yield b"".join(_pieces(value, depth=1))
        return
    for start in range(0, len(values), _ITEMS_OF_A_PIECE):
        yield _json(values[start : start + _ITEMS_OF_A_PIECE])[1:-1]


def _json(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="null")
