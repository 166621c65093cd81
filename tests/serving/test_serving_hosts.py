"""A server for this machine alone is not reached under a name that a web page made point here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import RunningServer, connect, read_all, running

from modernbert_decoder.errors import InputError
from modernbert_decoder.serving import settings as settings_module
from modernbert_decoder.serving.hosts import AllowedHosts
from modernbert_decoder.serving.server import _bound_socket
from modernbert_decoder.serving.settings import ModelSource, ServerSettings, is_loopback, parse_models

STORY = parse_models(["storyteller"])


@pytest.fixture(scope="module")
def named(sources: tuple[ModelSource, ...]) -> Iterator[RunningServer]:
    """A server with a further name."""
    with running(sources[:1], allowed_hosts=("Models.example.org",)) as started:
        yield started


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "LocalHost", "localhost.", "localhost:1", "127.0.0.1:65535"]
)
def test_the_machines_own_names_are_taken_with_any_port(server: RunningServer, host: str) -> None:
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "127.0.0.2",
        "[::2]",
        "::1",
        "localhost:8000:1",
        "user@localhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/nothing"])
def test_a_request_for_another_name_is_refused(server: RunningServer, path: str, host: str) -> None:
    response = server.get(path, headers={"Host": host})
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
    assert "--allowed-host" in error["message"]


def test_two_names_are_both_looked_at(server: RunningServer) -> None:
    connection = connect(server)
    connection.sendall(
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    )
    assert read_all(connection).startswith(b"HTTP/1.1 403")
    connection.close()


def test_what_is_no_browser_may_name_none(server: RunningServer) -> None:
    connection = connect(server)
    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 200")
    connection.close()


def test_further_names_are_added_to_the_machines_own(named: RunningServer) -> None:
    for host in ("models.example.org", "MODELS.example.org:443", "localhost"):
        assert named.get("/health", headers={"Host": host}).status_code == 200
    assert named.get("/health", headers={"Host": "example.org"}).status_code == 403


def test_a_long_name_is_not_quoted_whole(server: RunningServer) -> None:
    response = server.get("/health", headers={"Host": "x" * 10_000})
    assert response.status_code == 403
    assert len(response.content) < 500


def test_a_server_with_keys_or_for_others_has_any_name(sources: tuple[ModelSource, ...]) -> None:
    with running(sources[:1], api_keys=("first-key-0001",)) as server:
        assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 200
        assert "403" not in server.get("/openapi.json").text
    for settings in ({"host": "0.0.0.0"}, {"host": "::"}, {"host": "192.0.2.1"}, {"api_keys": ("k" * 8,)}):
        assert ServerSettings(models=STORY, **settings).host_names is None  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"api_keys": ("k" * 8,)}, {}])
def test_names_that_are_given_are_compared_in_any_case(settings: dict[str, Any]) -> None:
    names = ServerSettings(models=STORY, allowed_hosts=("a.example",), **settings).host_names
    assert names is not None
    assert {"a.example", "localhost"} <= set(names)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.5", "127.0.0.5"),
        ("::1", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("localhost", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.2", "127.0.0.2"),
        ("0x7f.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_every_address_of_this_machine_alone_is_guarded(host: str, address: str) -> None:
    names = ServerSettings(models=STORY, host=host).host_names
    assert names is not None
    assert host in names
    assert address in names  # which is the one that the server tells
    assert is_loopback(host)
    assert is_loopback(address)  # or it would be warned of


def test_a_name_of_this_machine_is_guarded_and_one_that_nobody_knows_is_left_to_listening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"mine.example": "127.0.1.1", "theirs.example": "192.0.2.1"}

    def look_up(host: str, port: None, **_: Any) -> list[Any]:
        if host not in known:
            raise settings_module.socket.gaierror(-2, "Name or service not known")
        return [(None, None, 0, "", (known[host], 0))]

    monkeypatch.setattr(settings_module.socket, "getaddrinfo", look_up)
    names = ServerSettings(models=STORY, host="mine.example").host_names
    assert names is not None
    assert {"mine.example", "127.0.1.1"} <= set(names)
    for host in ("theirs.example", "nobodys.example"):
        assert ServerSettings(models=STORY, host=host).host_names is None


@pytest.mark.parametrize("host", ["a..example", "x" * 300])
def test_what_is_no_name_is_refused_by_listening(host: str) -> None:
    settings = ServerSettings(models=STORY, host=host, port=0)
    assert settings.host_names is None
    with pytest.raises(InputError, match="cannot listen on"):
        _bound_socket(settings)


def test_names_are_looked_up_once_and_not_for_a_request(
    sources: tuple[ModelSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(sources[:1], allowed_hosts=("a.example",)) as server:

        def unexpected(self: ServerSettings) -> None:
            raise AssertionError("they were looked up again")

        monkeypatch.setattr(ServerSettings, "host_names", property(unexpected))
        assert "403" in server.get("/openapi.json").text


def test_addresses_of_ipv6_are_compared_and_not_their_spellings() -> None:
    async def unused(*_: Any) -> None:
        """Is behind the layer."""

    spellings = ("2001:DB8:0:0:0:0:0:1", "2001:db8::1", "2001:0db8::0001")
    for name in spellings:
        layer = AllowedHosts(unused, names=(name,))
        assert all(layer._is_allowed(f"[{host}]:8000") for host in spellings)
        assert not layer._is_allowed("[2001:db8::2]")
    layer = AllowedHosts(unused, names=("::ffff:127.0.0.1",))
    assert all(layer._is_allowed(host) for host in ("[::ffff:7f00:1]", "[::ffff:127.0.0.1]", "127.0.0.1"))


def test_the_document_tells_whether_names_are_compared(server: RunningServer) -> None:
    document = server.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "403" in operation["responses"], path


def test_any_name_may_be_allowed(sources: tuple[ModelSource, ...]) -> None:
    with running(sources[:1], allowed_hosts=("*",)) as server:
        assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "a.example/x", "", "*.example", "a b"])
def test_what_is_no_name_cannot_be_allowed(name: str) -> None:
    with pytest.raises(InputError, match="without scheme, port and path"):
        ServerSettings(models=STORY, allowed_hosts=(name,))
