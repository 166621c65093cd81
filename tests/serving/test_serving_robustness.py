"""Every request ends with an answer or a clear error, whatever its client or the engine does."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import (
    WAIT_SECONDS,
    Gate,
    RunningServer,
    connect,
    events,
    metric,
    raw_request,
    read_all,
    running,
    until,
)

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.serving.settings import EngineSettings, ModelSource

PROMPT = "Once upon a time"
ENDLESS = {"model": "tiny", "prompt": "ab", "max_tokens": 1900, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def small(folders: dict[str, Path]) -> Iterator[tuple[RunningServer, Gate]]:
    """A server with two slots and a queue of three, whose steps can be held."""
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    settings = EngineSettings(max_slots=2, max_waiting=3)
    with running([source], engine=settings) as server:
        yield server, Gate(server.engine("tiny").llm)


def start_stream(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    """A connection whose answer has begun."""
    connection = connect(server)
    connection.sendall(raw_request("/v1/completions", json.dumps({**body, "stream": True}).encode()))
    assert connection.recv(20).startswith(b"HTTP/1.1 200")
    return connection


# concurrency


# Of models in float32, w8a8 and int8.
MIXED: list[dict[str, Any]] = [
    {"model": model, "prompt": prompt, "max_tokens": length, "logprobs": logprobs, **how}
    for model, prompt in (("tiny", "a" * 300), ("tiny", "xyz"), ("exact", PROMPT), ("storyteller", "The"))
    for length, logprobs in ((5, None), (37, 2))
    for how in ({"temperature": 0}, {"seed": 5})
]


def without_names(reply: dict[str, Any]) -> Any:
    """What must not depend on when and beside whom a request was made."""
    return reply["choices"], reply["usage"]


def test_requests_among_16_others_are_answered_as_alone(server: RunningServer) -> None:
    alone = [server.post("/v1/completions", body).json() for body in MIXED]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: server.post("/v1/completions", body).json(), MIXED * 2))
    for one, other in zip([*alone, *alone], together, strict=True):
        assert without_names(one) == without_names(other)
    server.until_idle("tiny")


def test_16_streams_at_once_are_whole_and_not_mixed_up(server: RunningServer) -> None:
    def text(body: dict[str, Any]) -> str:
        chunks = events(server.post("/v1/completions", {**body, "stream": True}))
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    alone = [server.post("/v1/completions", body).json()["choices"][0]["text"] for body in MIXED]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, MIXED)) == alone


# the queue


def test_a_flood_is_answered_with_429_and_the_rest_is_served(small: tuple[RunningServer, Gate]) -> None:
    server, gate = small
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "ignore_eos": True}
    gate.is_open.clear()
    try:
        with ThreadPoolExecutor(24) as pool:
            first = [pool.submit(server.post, "/v1/completions", body)]
            until(lambda: server.stats("tiny").num_running == 1, server)
            flood = [pool.submit(server.post, "/v1/completions", body) for _ in range(20)]
            until(lambda: sum(each.done() for each in flood) >= 16, server)
            refused = [each.result() for each in flood if each.done()]
            gate.is_open.set()
            responses = [each.result() for each in (*first, *flood)]
    finally:
        gate.is_open.set()
    assert len(refused) == 16
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert (
        sorted(response.status_code for response in responses) == [200] * 5 + [429] * 16
    )  # one ran, one slot was free, three waited
    assert server.until_idle("tiny").kv_bytes_reserved == 0


def test_more_prompts_than_the_queue_holds_leave_nothing_behind(small: tuple[RunningServer, Gate]) -> None:
    server, gate = small
    gate.is_open.clear()
    try:
        body = {"model": "tiny", "prompt": ["ab"] * 8, "max_tokens": 2, "stream": True}
        assert server.post("/v1/completions", body).status_code == 429
    finally:
        gate.is_open.set()
    server.until_idle("tiny")
    assert server.post("/v1/completions", {**body, "prompt": ["ab"] * 3}).status_code == 200


# clients that vanish


def test_a_client_that_vanishes_mid_stream_frees_its_slot(small: tuple[RunningServer, Gate]) -> None:
    server, _ = small
    before = server.stats("tiny").num_generated_tokens
    start_stream(server, ENDLESS).close()
    stats = server.until_idle("tiny")
    assert stats.num_generated_tokens - before < 1900
    assert stats.kv_bytes_reserved == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_vanishes_costs_no_step_after_the_one_that_runs(
    small: tuple[RunningServer, Gate], is_streamed: bool
) -> None:
    server, gate = small
    status = 200 if is_streamed else 499
    line = f'mbd_requests_total{{endpoint="/v1/completions",status="{status}"}}'
    begun = server.until_idle("tiny").num_generated_tokens
    before = metric(server, line)
    connection = connect(server)
    body = json.dumps({**ENDLESS, "stream": is_streamed}).encode()
    connection.sendall(raw_request("/v1/completions", body))
    if is_streamed:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    until(lambda: server.stats("tiny").num_generated_tokens > begun, server)
    gate.is_open.clear()
    try:
        connection.close()
        until(lambda: metric(server, line) == before + 1, server)
        made = server.stats("tiny").num_generated_tokens
    finally:
        gate.is_open.set()
    # One step was being made when the client left, and one may have been held.
    assert server.until_idle("tiny").num_generated_tokens <= made + 2


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_vanishes_before_its_answer_begins_frees_its_slot(
    small: tuple[RunningServer, Gate], is_streamed: bool
) -> None:
    server, gate = small
    before = server.stats("tiny").num_generated_tokens
    gate.is_open.clear()
    try:
        body = {**ENDLESS, "stream": is_streamed, "prompt": ["ab", "cd"], "n": 2}
        connection = connect(server)
        connection.sendall(raw_request("/v1/completions", json.dumps(body).encode()))
        until(lambda: server.stats("tiny").num_running > 0, server)
        connection.close()
    finally:
        gate.is_open.set()
    assert server.until_idle("tiny").num_generated_tokens - before < 4 * 1900


def test_clients_that_vanish_one_after_the_other_leave_all_slots_free(
    small: tuple[RunningServer, Gate],
) -> None:
    server, _ = small
    for _ in range(12):
        start_stream(server, ENDLESS).close()
    server.until_idle("tiny")
    assert server.post("/v1/completions", {**ENDLESS, "max_tokens": 3}).status_code == 200


def test_a_client_that_vanishes_while_texts_are_read_is_forgotten(server: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "input": ["a" * 2000] * 64}).encode()
    connection = connect(server)
    connection.sendall(raw_request("/v1/embeddings", body))
    connection.close()
    server.until_idle("tiny")


# slow ones


def test_a_slow_reader_gets_everything_and_holds_nobody_up(server: RunningServer) -> None:
    expected = "".join(
        chunk["choices"][0]["text"]
        for chunk in events(server.post("/v1/completions", {**ENDLESS, "stream": True}))
    )
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(WAIT_SECONDS)
    connection.connect(server.address)
    body = json.dumps({**ENDLESS, "stream": True}).encode()
    connection.sendall(raw_request("/v1/completions", body, headers="Connection: close\r\n"))
    first = connection.recv(64)
    # Others are served, and the engine is done, while this client reads nothing.
    assert server.post("/v1/completions", {**ENDLESS, "max_tokens": 5}).status_code == 200
    server.until_idle("tiny")
    response = first + read_all(connection)
    connection.close()
    text = "".join(
        json.loads(line[6:])["choices"][0]["text"]
        for line in unchunked(response).decode().splitlines()
        if line.startswith("data: {")
    )
    assert text == expected


def unchunked(response: bytes) -> bytes:
    """The body of a response in HTTP's chunked encoding."""
    rest, body = response.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body


def test_half_a_body_is_answered_in_time(folders: dict[str, Path]) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], body_timeout=0.2) as server:
        connection = connect(server)
        connection.sendall(raw_request("/v1/completions", b"x" * 1000)[:-990])
        response = read_all(connection)
        assert response.startswith(b"HTTP/1.1 408")
        assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
        silent = connect(server)
        silent.sendall(b"POST /v1/comp")
        assert read_all(silent) == b""  # cut off
        connection.close()
        silent.close()


def test_a_head_without_end_is_refused_and_headers_behind_it_are_not_kept(
    small: tuple[RunningServer, Gate],
) -> None:
    server, _gate = small
    connection = connect(server)
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
    line = b"x-more: " + b"y" * 1000 + b"\r\n"
    with contextlib.suppress(ConnectionError):  # closed while more is on its way
        for _ in range(1000):
            connection.sendall(line)
    with contextlib.suppress(ConnectionError):
        response = read_all(connection)
        assert response == b"" or response.startswith(b"HTTP/1.1 431")
    connection.close()
    until(lambda: not server.api.server_state.connections, server)
    # One that is long, but has an end, is taken.
    long = connect(server)
    long.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + line * 30 + b"\r\n")
    assert read_all(long).startswith(b"HTTP/1.1 200")
    long.close()


def test_a_client_that_never_reads_is_dropped(folders: dict[str, Path]) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], write_timeout=0.2) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(WAIT_SECONDS)
        connection.connect(server.address)
        # More than the buffers between the two hold.
        body = {**ENDLESS, "n": 8, "logprobs": 20, "stream": True}
        connection.sendall(raw_request("/v1/completions", json.dumps(body).encode()))
        until(lambda: not server.api.server_state.connections - _idle(server), server)
        server.until_idle("tiny")
        connection.close()


def _idle(server: RunningServer) -> set[Any]:
    """Connections that answer nothing."""
    return {
        each
        for each in set(server.api.server_state.connections)
        if each.cycle is None or each.cycle.response_complete  # type: ignore[union-attr]
    }


# failures


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failing_step_ends_every_request_clearly_and_the_next_is_served(
    small: tuple[RunningServer, Gate], is_streamed: bool
) -> None:
    server, gate = small
    body = {**ENDLESS, "max_tokens": 30, "stream": is_streamed}
    gate.is_open.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.post, "/v1/completions", body)]
        until(lambda: server.stats("tiny").num_running == 1, server)
        waiting += [pool.submit(server.post, "/v1/completions", body) for _ in range(3)]
        until(lambda: server.stats("tiny").num_waiting == 3, server)
        gate.error = RuntimeError("a secret of the engine")
        gate.is_open.set()
        responses = [each.result() for each in waiting]
    failed = [response for response in responses if response.status_code == 500]
    assert failed
    assert {response.status_code for response in responses} <= {200, 500}
    for response in failed:
        assert response.json()["error"]["code"] == "engine_failed"
        assert "secret" not in response.text
    server.until_idle("tiny")
    assert server.get("/ready").status_code == 200
    assert server.post("/v1/completions", {**body, "stream": False}).status_code == 200


def test_a_step_that_fails_later_ends_a_stream_with_an_error_event(small: tuple[RunningServer, Gate]) -> None:
    server, gate = small
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=WAIT_SECONDS
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        gate.error = RuntimeError("broken")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "engine_failed"
    server.until_idle("tiny")


def test_a_defect_is_answered_without_its_message(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(server.engine("tiny"), "generate", broken)
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "server_error"
    assert "secret" not in response.text


# time


def test_a_request_that_takes_too_long_ends_with_what_there_is(folders: dict[str, Path]) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], timeout=0.15) as server:
        gate = Gate(server.engine("tiny").llm)
        whole = server.post("/v1/completions", {**ENDLESS, "n": 16})
        assert {each["finish_reason"] for each in whole.json()["choices"]} == {"timeout"}
        chunks = events(server.post("/v1/completions", {**ENDLESS, "n": 16, "stream": True}))
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert reasons.count("timeout") == 16
        gate.is_open.clear()
        with ThreadPoolExecutor(1) as pool:
            # Of this prompt the first step reads only a part.
            body = {**ENDLESS, "prompt": "a" * 1000, "max_tokens": 5, "stream": True}
            late = pool.submit(server.post, "/v1/completions", body)
            until(lambda: server.stats("tiny").num_running == 1, server)
            begun = time.monotonic()
            until(lambda: time.monotonic() > begun + 0.2, server)
            gate.is_open.set()
            response = late.result()
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"


def test_values_beside_a_running_stream_equal_the_engines(server: RunningServer, alone: LLM) -> None:
    connection = start_stream(server, ENDLESS)
    reply = server.post("/v1/score", {"model": "tiny", "input": PROMPT}).json()
    connection.close()
    assert reply["data"][0]["score"] == pytest.approx(alone.score([PROMPT])[0].total_logprob, abs=1e-4)
    (output,) = alone.generate([PROMPT], SamplingParams(temperature=0, max_tokens=9))
    text = server.post(
        "/v1/completions", {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 9}
    )
    assert text.json()["choices"][0]["text"] == output.outputs[0].text
