"""The load script tells what clients saw, also when things go wrong, and its page says what was held."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from typing import Any

import pytest
from benchmarks.results import from_json
from benchmarks.serving.load import (
    Answer,
    LoadResult,
    Workload,
    ask,
    local_address,
    percentiles,
    run_load,
    summarized,
)
from benchmarks.serving.report import FORMAT, Line, ServingResults, page
from benchmarks.serving.servers import LLAMA, OURS, Setup
from servers import RunningServer, connect

QUICK = Workload(prompt_words=(3, 6), output_tokens=(2, 5))


def test_clients_count_what_the_server_sent(server: RunningServer) -> None:
    before = server.stats("tiny").num_generated_tokens
    result = asyncio.run(
        run_load(server.url, model="tiny", clients=3, seconds=0.3, workload=QUICK, process_id=os.getpid())
    )
    assert result.errors == {}
    assert result.requests >= 3
    assert result.completion_tokens == server.until_idle("tiny").num_generated_tokens - before
    assert 0 < result.first_token[0] <= result.first_token[1]
    assert result.tokens_per_second == pytest.approx(result.completion_tokens / result.seconds)
    assert all(size > 0 for size in result.rss)


def test_errors_are_counted_by_what_they_say(server: RunningServer) -> None:
    body = {"model": "missing", **QUICK.request(0, 0)}
    assert asyncio.run(ask(server.address, "/v1/completions", body)).error == "status 404"
    connection = connect(server)
    free_port = connection.getsockname()
    connection.close()
    assert asyncio.run(ask(free_port, "/v1/completions", body)).error == "ConnectionRefusedError"


def test_requests_are_the_same_for_every_server_and_new_in_every_round() -> None:
    assert QUICK.request(1, 2) == QUICK.request(1, 2)
    assert QUICK.request(1, 2) != QUICK.request(2, 2)
    shared = [Workload(prefix_words=50, salt=salt).request(0, 0)["prompt"] for salt in "ab"]
    assert shared[0] != shared[1]
    assert shared[0][:80] == shared[1][:80]


@pytest.mark.parametrize("url", ["http://192.168.0.1:80", "http://10.0.0.1", "http://[2001:db8::1]:80"])
def test_only_this_machine_is_put_under_load(url: str) -> None:
    with pytest.raises(ValueError, match="only servers of this machine"):
        local_address(url)


def test_percentiles_are_those_of_the_values() -> None:
    assert percentiles([]) == (0.0, 0.0)
    assert percentiles([2.0]) == (2.0, 2.0)
    assert percentiles([float(i) for i in range(101)]) == (50.0, 95.0)


def result(tokens: int, first: float) -> LoadResult:
    return summarized(
        [Answer(0.0, [first, first + 0.01], prompt_tokens=5, completion_tokens=tokens)],
        clients=8,
        seconds=1.0,
        rss=[10, 11],
    )


@pytest.mark.parametrize(("rate", "verdict"), [(250, "held"), (150, "**not held**")])
def test_the_page_says_whether_the_target_was_held(rate: int, verdict: str) -> None:
    ours, theirs = Setup(OURS, "int8", "17m", (), "m"), Setup(LLAMA, "Q8_0", "17m", (), "m")
    mine, other = [result(rate, 0.1)] * 2, [result(100, 0.2)] * 2
    lines = [
        Line.of("17m", ours, 8, mine, mine, is_first=True),
        Line.of("17m", theirs, 8, other, mine, is_first=False),
    ]
    machine: dict[str, Any] = {
        "cpu": "X",
        "flags": [],
        "logical_processors": 2,
        "memory_gib": 1.0,
        "system": "Linux x86_64",
    }
    results = ServingResults(FORMAT, "2026-01-01", machine, 2, {"python": "3"}, False, [], lines)
    again = from_json(ServingResults, json.loads(json.dumps(asdict(results))))
    assert again == results
    assert f"| {verdict} | no worse first token | held |" in page(again)
