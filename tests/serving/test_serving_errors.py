"""Whatever is wrong with a request, the answer has OpenAI's shape and says what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import RunningServer, connect, raw_request, read_all, running

from modernbert_decoder.serving.errors import parameter_named
from modernbert_decoder.serving.limits import BodyLimit
from modernbert_decoder.serving.settings import ModelSource

JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"model": "tiny", "prompt": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "a"} trailing',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_a_json_object_is_refused(server: RunningServer, body: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    error_of(response, 400)


def test_lone_surrogates_are_no_text(server: RunningServer) -> None:
    for field in ("prompt", "user", "stop"):
        body = {"model": "tiny", "prompt": "a", field: "\ud800"}
        response = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=JSON)
        assert error_of(response, 400)["param"] == field
    strange = json.dumps({"model": "tiny", "prompt": "a", "\ud800": 1})
    error_of(httpx.post(f"{server.url}/v1/completions", content=strange, headers=JSON), 400)
    unknown = json.dumps({"model": "\ud800", "prompt": "a"})
    error_of(httpx.post(f"{server.url}/v1/completions", content=unknown, headers=JSON), 400)


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "x"],
)
def test_another_content_type_is_refused(server: RunningServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = b'{"model": "tiny", "prompt": "a"}'
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_the_charset_may_be_stated(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    assert httpx.post(f"{server.url}/v1/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/page/..%2f..%2fsettings.py", 404),
        ("GET", "/page/nothing.js", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/completions/", 404),
    ],
)
def test_wrong_paths_and_methods(server: RunningServer, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path)
    error_of(response, status)
    assert ("allow" in response.headers) == (status == 405)


@pytest.fixture(scope="module")
def narrow(sources: tuple[ModelSource, ...]) -> Iterator[RunningServer]:
    """Takes bodies of no more than 1,000 bytes."""
    with running(sources[:1], max_body=1000) as started:
        yield started


def test_a_body_that_is_too_large_is_refused(narrow: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a" * 5000}).encode()
    response = httpx.post(f"{narrow.url}/v1/completions", content=body, headers=JSON)
    assert error_of(response, 413)["code"] == "body_too_large"
    fitting = {"model": "tiny", "prompt": "a" * 900, "max_tokens": 1}
    assert narrow.post("/v1/completions", fitting).status_code == 200


def test_a_body_of_unknown_size_is_counted_as_it_comes(narrow: RunningServer) -> None:
    parts = (b"x" * 500 for _ in range(6))
    response = httpx.post(f"{narrow.url}/v1/completions", content=parts, headers=JSON)
    error_of(response, 413)


def test_an_endless_body_is_cut_off(narrow: RunningServer) -> None:
    connection = connect(narrow)
    head = raw_request("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    connection.sendall(head + chunk * 9)
    response = read_all(connection)
    assert response.startswith(b"HTTP/1.1 413")
    connection.close()


def test_what_is_no_http_is_answered_and_closed(server: RunningServer) -> None:
    connection = connect(server)
    connection.sendall(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03 hello\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 400")
    connection.close()
    assert server.get("/health").status_code == 200


def test_the_parameter_of_a_message_is_the_one_it_names_first() -> None:
    fields = {"prompt", "max_tokens", "n"}
    assert parameter_named("n must be 1 when temperature is 0", fields) == "n"
    assert parameter_named("nothing here", fields) is None


def test_bodies_that_together_are_too_large_are_refused_for_now() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 10, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # The body of this request is held while others like it arrive.
        held.append(scope)
        if len(held) < 40:
            await limit({"type": "http", "method": "POST", "headers": []}, receive_from_outside, send)

    held: list[Any] = []
    receive_from_outside = receive
    limit = BodyLimit(app, max_bytes=10, seconds=5)
    asyncio.run(limit({"type": "http", "method": "POST", "headers": []}, receive, send))
    assert len(held) == 32
    assert sent[0]["status"] == 429
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert limit._held == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({f"field{i}": 1 for i in range(1000)}, None),
        ({"logit_bias": {str(i): 1.0 for i in range(5000)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 5000}, "stop_token_ids"),
        ({"prompt": [[1]] * 5000}, "prompt"),
    ],
)
def test_long_lists_of_things_are_refused_by_their_length(
    server: RunningServer, body: dict[str, Any], param: str | None
) -> None:
    whole = {"model": "tiny", "prompt": "a", **body}
    error = error_of(httpx.post(f"{server.url}/v1/completions", json=whole), 400)
    assert error["param"] == param
    assert len(error["message"]) < 400


def test_a_body_announced_far_too_large_is_refused_before_it_comes(server: RunningServer) -> None:
    connection = connect(server)
    fields = ["host: localhost", "content-type: application/json", f"content-length: {10**12}"]
    connection.sendall("\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "\r\n"]).encode())
    assert read_all(connection).startswith(b"HTTP/1.1 413")
    connection.close()
