"""The load script tells what clients saw, also when things go wrong, and its page says what was held."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import publishing
from benchmarks.protocol import REPOSITORY
from benchmarks.results import from_json, save
from benchmarks.serving import __main__ as command
from benchmarks.serving import soak as soaking
from benchmarks.serving import speculation
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
from benchmarks.serving.pairs import Pair
from benchmarks.serving.report import CLIENTS, FORMAT, SIZES, Line, ServingResults, is_complete, page
from benchmarks.serving.servers import LLAMA, OURS, Setup
from benchmarks.serving.soak import Soak, soak
from benchmarks.serving.speculation import CASES, FULL_ROUNDS, SpeculationResults, SpeculationRow
from benchmarks.summary import Spread
from servers import RunningServer, connect, running

from modernbert_decoder.serving.settings import EngineSettings, ModelSource

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


# the page

MACHINE: dict[str, Any] = {
    "cpu": "X",
    "flags": [],
    "logical_processors": 2,
    "memory_gib": 1.0,
    "system": "Linux x86_64",
}


def result(tokens: int, p50: float, p95: float, *, rss: list[int] | None = None) -> LoadResult:
    """So many tokens in a second."""
    answer = Answer(0.0, [p50, p50 + 0.01], prompt_tokens=5, completion_tokens=tokens)
    whole = summarized([answer], clients=8, seconds=1.0, rss=rss or [])
    return replace(whole, first_token=(p50, p95))


def results_of(lines: list[Line], **changes: Any) -> ServingResults:
    given = {"rounds": 3, "seconds": 20.0, "is_quick": False, **changes}
    return ServingResults(FORMAT, "2026-01-01", MACHINE, 2, {"python": "3"}, absent=[], lines=lines, **given)


def lines_of(servers: tuple[str, ...], sizes: tuple[str, ...], clients: tuple[int, ...]) -> list[Line]:
    measured = [result(100, 0.1, 0.2)]
    setups = [Setup(server, "int8", size, (), "m") for size in sizes for server in servers]
    return [
        Line.of(setup.size, setup, count, measured, measured, is_first=setup.server == OURS)
        for setup in setups
        for count in clients
    ]


@pytest.mark.parametrize(
    ("rate", "first_token", "faster", "prompt"),
    [
        (250, (0.1, 0.3), "held", "held"),
        (150, (0.1, 0.3), "**not held**", "held"),
        (250, (0.1, 0.5), "held", "**not held**"),
        (250, (0.3, 0.3), "held", "**not held**"),
    ],
)
def test_the_page_says_whether_the_target_was_held(
    rate: int, first_token: tuple[float, float], faster: str, prompt: str
) -> None:
    ours, theirs = Setup(OURS, "int8", "17m", (), "m"), Setup(LLAMA, "Q8_0", "17m", (), "m")
    mine, other = [result(rate, *first_token)] * 2, [result(100, 0.2, 0.4)] * 2
    lines = [
        Line.of("17m", ours, 8, mine, mine, is_first=True),
        Line.of("17m", theirs, 8, other, mine, is_first=False),
    ]
    results = results_of(lines)
    again = from_json(ServingResults, json.loads(json.dumps(asdict(results))))
    assert again == results
    assert f"| {faster} | first token, p50 and p95, no worse | {prompt} |" in page(again)


def test_memory_that_grows_is_that_of_the_last_round() -> None:
    setup = Setup(OURS, "int8", "17m", (), "m")
    warming, flat = result(100, 0.1, 0.2, rss=[10, 30]), result(100, 0.1, 0.2, rss=[40, 41, 42])
    line = Line.of("17m", setup, 8, [warming, flat], [warming, flat], is_first=True)
    assert line.rss_growth == 1.05
    assert "| 1.05 |" in page(results_of([line]))
    unwatched = [result(100, 0.1, 0.2)]
    assert Line.of("17m", setup, 8, unwatched, unwatched, is_first=True).rss_growth is None


def test_the_quietest_rounds_are_kept_in_the_order_they_were_measured() -> None:
    first, second, third = ([result(tokens, 0.1, 0.2)] for tokens in (1, 2, 3))
    assert command.quietest([(0.1, first), (0.5, second), (0.0, third)], 2) == [first, third]


WHOLE = lines_of((OURS, LLAMA), SIZES, CLIENTS)


@pytest.mark.parametrize(
    ("lines", "changes", "lack"),
    [
        (WHOLE, {}, None),
        (WHOLE, {"rounds": 1}, "3 rounds (1 were measured)"),
        (WHOLE, {"seconds": 1.0}, "20 seconds for each (1 were taken)"),
        (lines_of((OURS,), SIZES, CLIENTS), {}, "llama-server at 17m with 1 client"),
        (lines_of((OURS, LLAMA), ("17m",), CLIENTS), {}, "mbd serve at 150m with 1 client"),
        (lines_of((OURS, LLAMA), SIZES, (1, 8)), {}, "17m with 32 clients, 150m with 32 clients"),
    ],
    ids=["whole", "rounds", "seconds", "llama-server", "size", "clients"],
)
def test_a_run_that_lacks_something_is_partial_and_its_page_says_what(
    lines: list[Line], changes: dict[str, Any], lack: str | None
) -> None:
    results = results_of(lines, **changes)
    assert is_complete(results) == (lack is None)
    assert ("**A partial run**" in page(results)) == (lack is not None)
    assert (lack or "") in page(results)
    assert not is_complete(results_of(WHOLE, is_quick=True))


def test_a_partial_run_is_published_only_when_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "REPOSITORY", tmp_path)
    (tmp_path / "docs").mkdir()
    results = results_of(WHOLE, rounds=1)
    save(results, tmp_path / "x.json")
    assert command.main(["--render", str(tmp_path / "x.json")]) == 2
    assert not list((tmp_path / "docs").iterdir())
    assert command.main(["--render", str(tmp_path / "x.json"), "--partial"]) == 0
    assert (tmp_path / "docs" / "serving-benchmarks.md").read_text(encoding="utf-8") == page(results)


def test_the_published_page_is_made_from_the_newest_results_alone() -> None:
    newest = max((REPOSITORY / "benchmarks" / "results").glob("*-serving.json"))
    published = (REPOSITORY / "docs" / "serving-benchmarks.md").read_text(encoding="utf-8")
    assert page(command.PUBLICATION.read(newest)) == published


def test_a_run_of_all_cases_of_speculation_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "REPOSITORY", tmp_path)
    monkeypatch.setattr(publishing, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(speculation, "use_engine_cache", lambda: None)
    (tmp_path / "docs").mkdir()
    measured = []

    def measure(case: Any, dtype: str, *, rounds: int, **_: Any) -> SpeculationRow:
        measured.append(case)
        pair = Pair(Spread.of([100.0]), Spread.of([250.0]), Spread.of([2.5]), rounds)
        return SpeculationRow(case.name, case.model, dtype, pair, 256, 2000, 1234)

    monkeypatch.setattr(speculation, "measure", measure)
    published = tmp_path / "docs" / "speculation-benchmarks.md"
    for partial in (["--rounds", "1"], ["--cases", "0", "1"]):
        assert speculation.main(partial) == 0
        assert not published.exists()
    measured.clear()
    assert speculation.main([]) == 0
    assert measured == list(CASES)
    text = published.read_text(encoding="utf-8")
    assert "partial" not in text
    for case in CASES:
        begin = f"| {case.name} | {case.model} int8 | {FULL_ROUNDS} |"
        assert f"{begin} 1,234 of 2,000 | 100 | 250 | 2.50 " in text
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert isinstance(speculation.PUBLICATION.read(path), SpeculationResults)


def test_the_published_page_of_speculation_is_made_from_the_newest_results_alone() -> None:
    newest = max((REPOSITORY / "benchmarks" / "results").glob("*-speculation.json"))
    published = (REPOSITORY / "docs" / "speculation-benchmarks.md").read_text(encoding="utf-8")
    assert speculation.page(speculation.PUBLICATION.read(newest)) == published


# the soak


@pytest.fixture(scope="module")
def bench(folders: dict[str, Path]) -> Iterator[RunningServer]:
    """Eight slots and a queue of eight."""
    source = ModelSource("bench", str(folders["tiny"]), "float32")
    with running([source], engine=EngineSettings(max_slots=8, max_waiting=8)) as started:
        yield started


def test_a_soaked_server_is_as_it_should_be(bench: RunningServer) -> None:
    problems = asyncio.run(soak(bench.url, os.getpid(), seconds=0.2, clients=(1, 8), has_own_process=False))
    assert problems == Counter()


def test_a_soak_notices_wrong_texts_and_floods_and_bodies_that_nobody_refuses(
    bench: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soaking, "_BURST", 1)  # with all the others, fewer than there are places
    monkeypatch.setattr(soaking, "_WELL_BEHAVED", 1)
    monkeypatch.setattr(soaking, "_TOO_LARGE", 100)
    monkeypatch.setattr(soaking, "_PATIENCE_SECONDS", 0.0)

    async def spoiled() -> Counter[str]:
        run = Soak(bench.url, os.getpid())
        run._expected = dict.fromkeys(range(24), "another text")
        await run.phase(1, 0.05)
        await run.trouble(1.0)
        return run.problems

    problems = asyncio.run(spoiled())
    assert {
        "1 clients: another text than alone",
        "flood: another text than alone",
        "never seen: flood: status 429",
        "too large: 400",
        "never seen: too large: 413",
    } <= set(problems)
    bench.until_idle("bench")
