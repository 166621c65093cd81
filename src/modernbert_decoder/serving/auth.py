"""API keys: who may call, compared in constant time.

A key comes as `Authorization: Bearer KEY`. Without any configured, everybody may call.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from modernbert_decoder.serving.context import record_in
from modernbert_decoder.serving.errors import ApiError

# They hold nothing secret: monitors ask the first two, and the page has to be there to type a key into.
_OPEN_PATHS: Final = frozenset({"/health", "/ready", "/", "/docs", "/openapi.json"})
_OPEN_FOLDERS: Final = ("/page/", "/docs/")


class ApiKeys:
    """Refuses requests without a valid key.

    Args:
        app: what is behind.
        keys: the valid ones; none lets everyone through.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        # Digests have one length, so that not even a key's length can be measured.
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets through what has a key, or needs none."""
        if scope["type"] == "http" and self._digests and not _is_open(scope["path"]):
            given = _bearer_token(scope)
            if given is None or not self._is_valid(given):
                what = "no API key was given" if given is None else "the API key is wrong"
                error = ApiError(
                    401,
                    f"{what}; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
            record = record_in(scope)
            record.client, record.has_key = f"key-{sha256(given).hexdigest()[:8]}", True
        await self._app(scope, receive, send)

    def _is_valid(self, key: bytes) -> bool:
        """Looks at every key whichever matches."""
        digest = sha256(key).digest()
        is_valid = False
        for each in self._digests:
            is_valid |= hmac.compare_digest(each, digest)
        return is_valid


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


def _bearer_token(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = bytes(value).partition(b" ")
            return token.strip() if scheme.lower() == b"bearer" and token.strip() else None
    return None
