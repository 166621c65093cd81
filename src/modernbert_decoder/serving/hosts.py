"""Names of the server that a request may be for, so that no web page reaches it under a name of its own.

A page of another site can point its own name at this machine (DNS rebinding) and would then be of the same
origin as the server. Browsers send the name as `Host`; this module compares it and knows nothing else.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from modernbert_decoder.serving.errors import ApiError, shortened

ANY_HOST: Final = "*"
LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_HOST: Final = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:]+))(?::[0-9]*)?")


class AllowedHosts:
    """Refuses requests for other names.

    Args:
        app: what is behind.
        names: without ports, IPv6 addresses without brackets; `*` is any.
    """

    def __init__(self, app: ASGIApp, *, names: Sequence[str]) -> None:
        self._app = app
        self._names = frozenset(map(_plain, names))
        self._takes_any = ANY_HOST in names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets through what is for this server, and what names none, as no browser does."""
        if scope["type"] == "http" and not self._takes_any:
            hosts = [bytes(value).decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            stranger = next((host for host in hosts if not self._is_allowed(host)), None)
            if stranger is not None:
                await _refusal(stranger).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        match = _HOST.fullmatch(host.strip().lower())
        return match is not None and _plain(match["v6"] or match["name"]) in self._names


def _plain(name: str) -> str:
    """Of several spellings of a name, the one that is compared.

    >>> _plain("LocalHost."), _plain("0:0::1"), _plain("::ffff:127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    name = name.lower().removesuffix(".")
    try:
        return plain_address(name).compressed
    except ValueError:
        return name


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address a text spells; the one of IPv4 where it stands within one of IPv6.

    Raises:
        ValueError: it is none.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if inner is None else inner


def _refusal(host: str) -> ApiError:
    return ApiError(
        403,
        f"this server is not reached as {shortened(host)!r}; use http://localhost, or start it with "
        "--allowed-host and that name",
        code="host_not_allowed",
    )
