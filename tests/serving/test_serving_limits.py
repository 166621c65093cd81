"""What is too large or no request at all is refused early, in few words, and counted where it belongs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn
from servers import WAIT_SECONDS, RunningServer, connect, metric, raw_request, read_all, running
from uvicorn.server import ServerState

from modernbert_decoder.serving.access_log import RequestLog
from modernbert_decoder.serving.connections import MAX_HEAD_BYTES, impatient_protocol
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.limits import BodyLimit
from modernbert_decoder.serving.metrics import Metrics
from modernbert_decoder.serving.server import set_up_logging
from modernbert_decoder.serving.settings import ModelSource
from modernbert_decoder.serving.strict_json import parse_json

JSON = {"Content-Type": "application/json"}
KEY = "first-key-0001"


@pytest.fixture(scope="module")
def narrow(sources: tuple[ModelSource, ...]) -> Iterator[RunningServer]:
    """Takes bodies of no more than 1,000 bytes, and waits 1.5 seconds for them."""
    with running(sources[:1], max_body=1000, body_timeout=1.5) as started:
        yield started


def head(length: int, *fields: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def answered(connection: Any) -> bytes:
    """What has come once a whole answer of JSON is there."""
    data = b""
    while b"\r\n\r\n" not in data or data.count(b"{") != data.count(b"}") or b"{" not in data:
        part = connection.recv(65_536)
        assert part, "the connection was closed before the answer"
        data += part
    return data


# bodies


@pytest.mark.parametrize("length", [1001, 7000])
def test_a_body_announced_too_large_is_answered_before_any_of_it_comes(
    narrow: RunningServer, length: int
) -> None:
    connection = connect(narrow)
    connection.sendall(head(length))
    response = answered(connection)  # of a body of which nothing was sent
    assert response.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in response
    connection.sendall(b"x" * length)  # it may come still, and is not answered again
    assert read_all(connection) == b""
    connection.close()


def test_a_client_that_asks_first_is_not_told_to_go_on(narrow: RunningServer) -> None:
    connection = connect(narrow)
    connection.sendall(head(5000, "Expect: 100-continue"))
    response = answered(connection)
    assert response.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in response
    connection.close()


def test_a_body_in_chunks_is_refused_with_the_byte_that_is_too_many(narrow: RunningServer) -> None:
    connection = connect(narrow)
    start = raw_request("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    connection.sendall(start + b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    connection.sendall(b"1\r\nx\r\n")  # more would follow
    assert answered(connection).startswith(b"HTTP/1.1 413")
    connection.close()


def test_a_body_that_just_fits_is_taken(narrow: RunningServer) -> None:
    frame = len(json.dumps({"model": "tiny", "prompt": "", "max_tokens": 1}))
    body = json.dumps({"model": "tiny", "prompt": "a" * (1000 - frame), "max_tokens": 1}).encode()
    assert len(body) == 1000
    response = httpx.post(f"{narrow.url}/v1/completions", content=body, headers=JSON)
    assert response.status_code == 200


def test_a_refused_body_is_given_up_before_the_rest_is_taken_off_the_connection() -> None:
    freed: list[int] = []

    class Part(bytes):
        def __del__(self) -> None:
            freed.append(len(self))

    async def try_it() -> None:
        is_discarding = asyncio.Event()
        num_asked = 0

        async def receive() -> Any:
            nonlocal num_asked
            num_asked += 1
            if num_asked > 2:
                is_discarding.set()
                await asyncio.Event().wait()
            return {"type": "http.request", "body": Part(b"x" * 600), "more_body": True}

        async def send(message: Any) -> None:
            """Takes the answer."""

        async def unexpected(*_: Any) -> None:
            raise AssertionError("the body was taken")

        layer = BodyLimit(unexpected, max_bytes=1000, seconds=WAIT_SECONDS)
        scope = {"type": "http", "method": "POST", "headers": []}
        answering = asyncio.ensure_future(layer(scope, receive, send))
        await asyncio.wait_for(is_discarding.wait(), WAIT_SECONDS)
        assert freed == [600, 600]
        assert layer._held == 0
        answering.cancel()

    asyncio.run(try_it())


# fields before and behind a body


class Wire(asyncio.Transport):
    """A connection of which the server's half is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        """Nothing is read by itself."""

    resume_reading = pause_reading


def fed(parts: Sequence[bytes]) -> tuple[bytes, int, list[tuple[bytes, bytes]]]:
    """What the server says to these, of how many of them it has seen by then, and the fields it hands on."""
    headers: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers.extend(scope["headers"])
        while (await receive()).get("more_body", False):
            pass
        headers[:] = scope["headers"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def feed() -> tuple[bytes, int]:
        log = RequestLog(Metrics(dict), endpoint_of=lambda path: None)
        protocol = impatient_protocol(head_seconds=WAIT_SECONDS, write_seconds=WAIT_SECONDS, log=log)
        config = uvicorn.Config(app, log_config=None, access_log=False)
        connection = protocol(config=config, server_state=ServerState(), app_state={})
        wire = Wire()
        connection.connection_made(wire)
        num_fed = 0
        for part in parts:
            connection.data_received(part)
            num_fed += 1
            for _ in range(5):  # turns of the loop, for the application
                await asyncio.sleep(0)
            if wire.is_closed:
                break
        connection.connection_lost(None)
        return wire.sent, num_fed

    return (*asyncio.run(feed()), headers)


CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
FIELD = b"x-more: " + b"y" * 1000 + b"\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [CHUNKED, b"0\r\n", *[FIELD] * 500],
        [CHUNKED + b"0\r\n", *[FIELD * 10] * 50],
        [CHUNKED, b"0\r\n", b"x-more: ", *[b"y" * 1000] * 500],
        [CHUNKED, b"2;", *[b"y" * 1000] * 500],
        [b"GET /", *[b"y" * 1000] * 500],
        [b"GET / HTTP/1.1\r\nx-more: ", *[b"y" * 1000] * 500],
        [b"GET / HTTP/1.1\r\n" + FIELD * 500 + b"\r\n"],
    ],
    ids=[
        "trailers",
        "trailers at once",
        "a trailer",
        "a chunk's head",
        "a path",
        "a field",
        "a head at once",
    ],
)
def test_fields_without_end_are_refused_wherever_they_stand(parts: list[bytes]) -> None:
    sent, num_fed, headers = fed(parts)
    assert sent.startswith(b"HTTP/1.1 431 ")
    assert sent.count(b"HTTP/1.1") == 1
    assert sum(map(len, parts[1:num_fed])) < 1.2 * MAX_HEAD_BYTES
    assert not [name for name, _ in headers if name == b"x-more"]


def test_fields_behind_a_body_are_let_through_and_say_nothing_of_the_request() -> None:
    sent, _, headers = fed([CHUNKED, *[b"1\r\nx\r\n"] * 20_000, b"0\r\n" + FIELD * 60 + b"\r\n"])
    assert sent.startswith(b"HTTP/1.1 200 ")
    assert [name for name, _ in headers] == [b"host", b"transfer-encoding"]


# counting


def counted(server: RunningServer, endpoint: str, status: int) -> float:
    return metric(server, f'mbd_requests_total{{endpoint="{endpoint}",status="{status}"}}')


def test_answers_of_layers_count_for_the_endpoint_they_were_for(narrow: RunningServer) -> None:
    wanted = [("/v1/completions", 413), ("/v1/score", 408), ("/v1/completions", 431), ("/v1/rank", 403)]
    before = [counted(narrow, *each) for each in wanted]
    connection = connect(narrow)
    connection.sendall(head(2000))
    assert answered(connection).startswith(b"HTTP/1.1 413")
    connection.close()
    connection = connect(narrow)
    connection.sendall(head(500, path="/v1/score"))
    assert read_all(connection).startswith(b"HTTP/1.1 408")
    connection.close()
    connection = connect(narrow)
    line = b"x-more: " + b"y" * 1000 + b"\r\n"
    connection.sendall(b"POST /v1/completions?x=1 HTTP/1.1\r\n" + line * 70)
    response = answered(connection)
    assert response.startswith(b"HTTP/1.1 431")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"
    connection.close()
    assert narrow.post("/v1/rank", {}, headers={"Host": "evil.example"}).status_code == 403
    narrow.get("/health")
    assert [counted(narrow, *each) for each in wanted] == [each + 1 for each in before]


def test_a_missing_key_counts_for_the_endpoint_and_unknown_paths_have_one_name(
    sources: tuple[ModelSource, ...],
) -> None:
    with running(sources[:1], api_keys=(KEY,)) as server:
        for path in ("/v1/models", "/v1/models/tiny", "/v1/made/up", "/v1/modelsx", "/x/v1/models"):
            assert server.get(path).status_code == 401
        metrics = server.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'mbd_requests_total{endpoint="/v1/models",status="401"} 1.0' in metrics
    assert 'mbd_requests_total{endpoint="/v1/models/{model}",status="401"} 1.0' in metrics
    assert 'mbd_requests_total{endpoint="other",status="401"} 3.0' in metrics
    assert "made" not in metrics


def test_what_is_no_http_is_answered_in_json_and_counted(narrow: RunningServer) -> None:
    before = counted(narrow, "other", 400)
    connection = connect(narrow)
    connection.sendall(b"\x16\x03\x01\x00\xa5\x01\x00 hello\r\n\r\n")
    response = read_all(connection)
    connection.close()
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert b"x-request-id: " in response
    assert counted(narrow, "other", 400) == before + 1


# logs


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the server's own log says."""
    loggers = [logging.getLogger(name) for name in ("modernbert_decoder", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    written = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", written)
        set_up_logging("text")
    yield written
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_every_line_that_a_client_causes_tells_who_it_was(server: RunningServer, logged: io.StringIO) -> None:
    upgrade = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    )
    for sent in (upgrade, b"nonsense\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n"):
        connection = connect(server)
        connection.sendall(sent)
        connection.shutdown(1)
        read_all(connection)
        connection.close()
    server.get("/health")
    lines = logged.getvalue().splitlines()
    assert len(lines) >= 3
    assert [line for line in lines if " client=127.0.0.1 " not in line or "request_id=" not in line] == []


def test_a_refusal_behind_a_running_request_is_logged_under_the_id_that_was_sent(
    server: RunningServer, logged: io.StringIO
) -> None:
    start = raw_request("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    connection = connect(server)
    connection.sendall(start + b"1\r\n{\r\n" + b"nonsense\r\n")
    response = read_all(connection)
    connection.close()
    assert response.startswith(b"HTTP/1.1 400")
    (number,) = re.findall(rb"x-request-id: (\w+)", response)
    (line,) = [line for line in logged.getvalue().splitlines() if number.decode() in line]
    assert "endpoint=/v1/completions" in line
    assert "status=400" in line


# messages


def test_no_message_quotes_more_than_it_takes_to_recognize_it(server: RunningServer) -> None:
    long = "m" * 100_000
    bodies: list[dict[str, Any]] = [
        {"model": long, "prompt": "a"},
        {"model": "tiny", "prompt": "a", long: 1},
        {"model": "tiny", "prompt": "a", "response_format": {"type": "text", long: 1}},
        {"model": "tiny", "prompt": "a", "structured_outputs": {"choice": [*["x" * 60] * 900, ""]}},
        {"model": "tiny", "prompt": "a", "structured_outputs": {"regex": "(" * 60_000}},
        {
            "model": "tiny",
            "prompt": "a",
            "structured_outputs": {"grammar": "start: max_tokens " + "x " * 9_000},
        },
        {"model": "tiny", "prompt": "a", "structured_outputs": {"json": {"type": long[:9000]}}},
        {"model": "tiny", "prompt": "a", "stop": [long] * 20},
    ]
    for body in bodies:
        response = server.post("/v1/completions", body)
        assert 400 <= response.status_code < 500, response.text[:300]
        assert len(response.content) < 2_000, response.text[:300]
        error = response.json()["error"]
        if "structured_outputs" in body:
            assert error["param"] == "structured_outputs"
    assert len(server.get(f"/v1/models/{long[:30_000]}").content) < 500


def test_an_error_of_whatever_source_is_told_in_few_words() -> None:
    error = ApiError(400, "m" * 100_000, param="p" * 100_000).body["error"]
    assert len(error["message"]) < 1_100
    assert len(error["param"]) < 150


def test_a_user_is_a_name_and_no_text(server: RunningServer) -> None:
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "a", "user": "u" * 257})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "user"


# HEAD


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_monitors_may_ask_with_head(server: RunningServer, path: str) -> None:
    asked = httpx.head(server.url + path)
    assert asked.status_code == 200
    assert asked.content == b""
    assert asked.headers["content-length"] == server.get(path).headers["content-length"]


# JSON of very many parts


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 70_000 + b"1]",
        b"[" + b"{}," * 70_000 + b"1]",
        b"{" + b'"a":1,' * 70_000 + b'"b":1}',
        b"[" + b"1," * 2**18 + b"1]",
        b'"' + b":" * 70_000 + b'"' * 2_000_000,
        b'{"prompt": "' + b"x\\\\" * 1000 + b'", "n": [' + b"[]," * 70_000 + b"1]}",
    ],
    ids=["lists", "objects", "fields", "values", "texts", "behind a text"],
)
def test_bodies_of_very_many_parts_are_refused_unread(
    server: RunningServer, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("modernbert_decoder.serving.strict_json.json.loads", unexpected)
    response = httpx.post(f"{server.url}/tokenize", content=body, headers=JSON)
    assert response.status_code == 400
    error = json.JSONDecoder().decode(response.text)["error"]
    assert "no request needs" in error["message"]


@pytest.mark.parametrize(
    "text", ['[{":,' * 300_000, '\\"[{' * 100_000, '"' * 300_000 + "[" * 70_000, "\\[" * 70_000]
)
def test_signs_inside_of_texts_are_no_parts(text: str) -> None:
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


# integers of very many digits


@pytest.mark.parametrize("sign", [b"", b"-"])
def test_integers_that_no_number_of_ours_is_as_long_as_are_refused_unread(
    sign: bytes,
) -> None:
    largest = sign + b"9" * 309
    assert parse_json(b'{"a": [%s]}' % largest) == {"a": [int(largest)]}
    for digits in (310, 4_000, 100_000):
        with pytest.raises(ApiError, match="an integer has more than 309 digits"):
            parse_json(b'{"a": [1, %s%s]}' % (sign, b"9" * digits))


def test_digits_of_a_text_are_no_integer() -> None:
    text = "7" * 5_000
    assert parse_json(json.dumps({"prompt": text, "n": 2}).encode()) == {"prompt": text, "n": 2}


def test_a_body_may_have_as_many_values_as_are_said() -> None:
    texts = ["a"] * (2**18 - 1)
    body = json.dumps({"input": texts, "tags": [["b", "c"]] * 1_000}).encode()
    with pytest.raises(ApiError, match="more than 262,144 values"):
        parse_json(body)
    fields = {f"k{i}": "a" for i in range(65_000)}
    body = json.dumps([fields, *["a"] * (2**18 - 65_100)]).encode()
    assert len(parse_json(body)) == 2**18 - 65_099
