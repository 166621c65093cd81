"""The benchmark of training: what is compared, how it is judged, and one tiny run of both sides."""

from __future__ import annotations

import doctest
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import publishing  # noqa: E402
from benchmarks.machine import slug  # noqa: E402
from benchmarks.summary import Spread  # noqa: E402
from benchmarks.training import __main__ as command  # noqa: E402
from benchmarks.training import cases, epoch, measure, report  # noqa: E402
from benchmarks.training.cases import (  # noqa: E402
    FULL,
    GROUPED,
    OURS,
    QUICK,
    RANDOM,
    UPSTREAM,
    Way,
    Workload,
    pairs,
)
from benchmarks.training.documents import read_documents, write_documents, write_pairs  # noqa: E402
from benchmarks.training.measure import LossPair, compare_losses, summarize, write_files  # noqa: E402
from benchmarks.wing.measure import Round  # noqa: E402


def make_answer(way: Way, *, slow: float = 1.0, speed: float = 2.0, memory: float = 0.4) -> dict[str, Any]:
    """Of ours: `speed` times as fast as upstream, `memory` times as large."""
    is_ours = way.runtime == OURS
    return {
        "seconds": slow * (3.0 if is_ours else 4.0 * speed),
        "targets": 3000 if is_ours else 4000,  # packed and padded rounds hold unequal numbers of tokens
        "positions": 5000,
        "padding": 0 if is_ours else 1000,
        "losses": [10.9, 10.8],
        "growth_bytes": 1e9 * (memory if is_ours else 1.0),
        "peak_bytes": 2 * 10**9,
    }


def make_results(load: Workload = FULL, **changes: float) -> report.TrainingResults:
    rounds = [
        Round([make_answer(way, slow=slow, **changes) for way in load.ways], 0.0, 1.0)
        for slow in (1.0, 10.0, 2.0)
    ]
    largest = Round([make_answer(way, memory=0.3) for way in load.ways], 0.0, 1.0)
    rows, comparisons = summarize(load, rounds, largest)
    machine = {
        "cpu": "Some CPU",
        "flags": ["avx2", "avx512_bf16"],
        "logical_processors": 2,
        "memory_gib": 8.0,
        "system": "Linux x86_64",
    }
    return report.TrainingResults(
        format=report.FORMAT,
        date="2026-01-02",
        machine=machine,
        threads=2,
        versions={"python": "3.11.0"},
        others_share=Spread(0.01, 0.0, 0.2),
        is_quick=False,
        rows=rows,
        comparisons=comparisons,
        losses=[LossPair("flattened", 1, 10.9, 10.9), LossPair("flattened", 2, 10.8, 10.80001)],
    )


# What is compared


def test_each_of_our_ways_meets_every_one_of_upstreams_in_its_precision() -> None:
    for ours in (way for way in FULL.ways if way.runtime == OURS):
        met = {upstream.name for each, upstream in pairs(FULL.ways) if each == ours}
        assert met == {
            way.name for way in FULL.ways if (way.runtime, way.precision) == (UPSTREAM, ours.precision)
        }


def test_all_of_upstreams_kinds_of_batches_are_measured_large_and_small() -> None:
    measured = {
        (way.order, way.is_flattened, way.at_once)
        for way in FULL.ways
        if (way.runtime, way.precision) == (UPSTREAM, "float32")
    }
    assert measured >= {(GROUPED, False, 8), (GROUPED, False, 2), (RANDOM, True, 8), (RANDOM, True, 2)}
    assert measured >= {(RANDOM, False, 8), (RANDOM, False, 1)}
    assert len({way.key for way in FULL.ways}) == len(FULL.ways)


def test_each_of_our_ways_has_a_peer_with_as_many_tokens_at_once() -> None:
    for ours in (way for way in FULL.ways if (way.runtime, way.precision) == (OURS, "float32")):
        alike = [
            upstream
            for each, upstream in pairs(FULL.ways)
            if each == ours and FULL.tokens_at_once(upstream) == FULL.tokens_at_once(ours)
        ]
        assert {(way.order, way.is_flattened) for way in alike} >= {(GROUPED, False), (RANDOM, True)}


def test_a_step_of_packed_sequences_holds_as_many_tokens_as_one_of_documents_in_the_mean() -> None:
    for load in (FULL, QUICK):
        mean = (load.shortest + load.longest) / 2
        assert load.sequences_per_step * load.sequence_length == load.documents_per_step * mean
        for way in load.ways:
            per_step = load.sequences_per_step if way.runtime == OURS else load.documents_per_step
            assert per_step % way.at_once == 0
    assert (FULL.shortest, FULL.longest) == (128, 1024)


def test_documents_have_the_lengths_of_the_workload_and_are_the_same_every_time(tmp_path: Path) -> None:
    load = replace(FULL, num_documents=300)
    documents = read_documents(write_documents(tmp_path / "a.jsonl", load))
    lengths = [len(ids) + 2 for ids in documents]
    assert len(lengths) == 300
    assert 128 <= min(lengths) < 160
    assert 992 < max(lengths) <= 1024
    assert sum(lengths) / len(lengths) == pytest.approx(576, rel=0.1)
    assert max(max(ids) for ids in documents) < 50_000  # no special token
    assert read_documents(write_documents(tmp_path / "b.jsonl", load)) == documents


def test_pairs_of_documents_fill_a_sequence_exactly(tmp_path: Path) -> None:
    documents = read_documents(write_pairs(tmp_path / "pairs.jsonl", FULL))
    assert len(documents) == FULL.check_steps * FULL.documents_per_step
    for first, second in zip(documents[::2], documents[1::2], strict=True):
        assert len(first) + len(second) + 4 == FULL.sequence_length


def test_bfloat16_is_measured_where_the_processor_has_it() -> None:
    assert cases.available_precisions(["avx2", "avx512_bf16"]) == ("float32", "bfloat16")
    ways = FULL.with_precisions(cases.available_precisions(["avx2"])).ways
    assert {way.precision for way in ways} == {"float32"}
    assert len(ways) == len(FULL.ways) - 2


# Which batches are measured


def longest_first(lengths: Sequence[int]) -> list[int]:
    """An order as cruel as the library's: an epoch of descending lengths, without its four repetitions."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def library_order(lengths: list[int]) -> list[int]:
    """That of the installed transformers."""
    pytest.importorskip("optimi")
    pytest.importorskip("transformers")
    from benchmarks.training.upstream_worker import UpstreamWorker

    worker = UpstreamWorker()
    order: list[int] = worker.length_groups(lengths=lengths, documents_per_step=8)["order"]
    return order


def lengths_of(path: Path) -> list[int]:
    return [len(ids) + 2 for ids in read_documents(path)]


def trained_lengths(load: Workload, way: Way, path: Path) -> list[int]:
    """Of the documents on which a round trains; of ours, those that are at least begun."""
    lengths = lengths_of(path)
    if way.runtime == UPSTREAM:
        assert len(lengths) == load.steps * load.documents_per_step
        return lengths
    tokens, count = load.steps * load.sequences_per_step * load.sequence_length, 0
    while sum(lengths[:count]) < tokens:
        count += 1
    return lengths[:count]


@pytest.mark.parametrize("order", [longest_first, library_order])
def test_documents_that_are_measured_have_the_mean_length_of_all_on_every_side(
    tmp_path: Path, order: measure.LengthGroups
) -> None:
    files = write_files(FULL, tmp_path, order)
    population = lengths_of(tmp_path / "documents.jsonl")
    mean = sum(population) / len(population)
    for way in FULL.ways:
        measured = trained_lengths(FULL, way, files[way].typical)
        assert sum(measured) / len(measured) == pytest.approx(mean, rel=0.03), way


def test_the_librarys_own_first_batches_would_be_the_longest(tmp_path: Path) -> None:
    lengths = lengths_of(write_documents(tmp_path / "documents.jsonl", FULL))
    first = [lengths[i] for i in library_order(lengths)[: FULL.steps * FULL.documents_per_step]]
    assert sum(first) / len(first) > 900


def test_the_largest_batch_is_the_one_that_computes_most_at_once(tmp_path: Path) -> None:
    files = write_files(FULL, tmp_path, longest_first)
    population = lengths_of(tmp_path / "documents.jsonl")
    batches = epoch.batches_of(population, 8)
    for way in (each for each in FULL.ways if each.runtime == UPSTREAM):
        smallest, largest = epoch.batches_of(lengths_of(files[way].extreme), 8)
        at_once = [epoch.positions_at_once(way, each) for each in (smallest, largest)]
        assert at_once[0] < at_once[1]
        if way.order == GROUPED:
            assert largest == sorted(population)[:-9:-1]
            assert at_once[1] == way.at_once * max(population)
        else:
            assert at_once[1] == max(epoch.positions_at_once(way, each) for each in batches)


def test_padding_counts_as_computed_and_rows_of_documents_have_none() -> None:
    lengths = [10, 2, 5, 6]
    assert epoch.positions_at_once(Way(UPSTREAM, "", 2), lengths) == 20
    assert epoch.positions_at_once(Way(UPSTREAM, "", 4), lengths) == 40
    assert epoch.positions_at_once(Way(UPSTREAM, "", 2, is_flattened=True), lengths) == 12


def test_ours_and_the_ways_in_random_order_train_on_the_same_documents(tmp_path: Path) -> None:
    files = write_files(QUICK, tmp_path, longest_first)
    flattened, packed = (
        read_documents(files[way].typical) for way in QUICK.ways if way.runtime == OURS or way.order == RANDOM
    )
    assert packed[: len(flattened)] == flattened
    everything = read_documents(tmp_path / "documents.jsonl")
    assert sorted(packed) == sorted(everything)  # none is lost, none comes twice


# How it is judged


def test_ratios_are_of_useful_tokens_per_second_within_each_round() -> None:
    results = make_results(speed=2.0, memory=0.4)
    for each in results.comparisons:
        assert each.speed == Spread(*[pytest.approx(2.0)] * 3)  # whatever the round's own pace
        assert each.memory == Spread(*[pytest.approx(0.4)] * 3)
        assert each.largest_memory == pytest.approx(0.3)
    ours = next(row for row in results.rows if row.runtime == OURS)
    assert ours.tokens_per_second == Spread(500.0, 100.0, 1000.0)
    assert ours.seconds == Spread(6.0, 3.0, 30.0)
    padded = next(row for row in results.rows if row.runtime == UPSTREAM)
    assert (ours.padding, padded.padding) == (0.0, 0.2)


def verdicts(results: report.TrainingResults) -> list[bool | None]:
    return [claim.is_held for claim in report.check_claims(results)]


def test_verdicts_turn_at_the_numbers_to_hold() -> None:
    assert verdicts(make_results(speed=1.51, memory=0.59)) == [True, True, True, True, None, None, True]
    assert verdicts(make_results(speed=1.49, memory=0.59)) == [False, False, True, True, None, None, True]
    assert verdicts(make_results(speed=1.51, memory=0.61)) == [True, True, False, False, None, None, True]
    results = make_results()
    assert verdicts(replace(results, losses=[LossPair("padded", 1, 10.0, 10.001)]))[-1] is False


def faster(results: report.TrainingResults, way: str) -> report.TrainingResults:
    """The same with one way, in float32, ahead of its side."""
    rows = [
        replace(row, tokens_per_second=Spread(1e6, 1e6, 1e6))
        if (row.way, row.precision) == (way, "float32")
        else row
        for row in results.rows
    ]
    return replace(results, rows=rows)


def lost(
    results: report.TrainingResults, way: str, peer_way: str, precision: str = "float32"
) -> report.TrainingResults:
    """The same with one comparison in which we are no better."""
    even = Spread(1.0, 1.0, 1.0)
    comparisons = [
        replace(each, speed=even, memory=even)
        if (each.way, each.peer_way, each.precision) == (way, peer_way, precision)
        else each
        for each in results.comparisons
    ]
    return replace(results, comparisons=comparisons)


BATCHES = [
    way.name for way in FULL.ways if (way.runtime, way.precision) == (UPSTREAM, "float32") and way.at_once > 1
]


@pytest.mark.parametrize("peer_way", BATCHES)
def test_any_of_upstreams_batches_decides_if_it_is_the_fastest(peer_way: str) -> None:
    results = faster(faster(make_results(), peer_way), "packed, 1 at once")
    assert verdicts(results)[:4] == [True, True, True, True]
    against = verdicts(lost(results, "packed, 1 at once", peer_way))
    assert (against[1], against[3]) == (False, False)
    slower = verdicts(lost(results, "packed, 4 at once", peer_way))
    assert (slower[1], slower[3]) == (True, True)


@pytest.mark.parametrize(("way", "at_once"), [("packed, 1 at once", "2"), ("packed, 4 at once", "8")])
def test_memory_is_held_against_every_batch_of_as_many_tokens_and_speed_against_the_usual_ones(
    way: str, at_once: str
) -> None:
    results = faster(faster(make_results(), "random order, 8 at once"), "packed, 1 at once")
    for peer_way in BATCHES:
        is_alike = f" {at_once} at once" in peer_way
        found = verdicts(lost(results, way, peer_way))
        assert found[2] is not is_alike
        assert found[0] is not (is_alike and at_once == "8")


def test_single_documents_are_reported_even_if_they_are_the_fastest() -> None:
    results = faster(faster(make_results(), "single documents"), "packed, 4 at once")
    single = lost(results, "packed, 4 at once", "single documents")
    assert verdicts(single) == [True, True, True, True, None, None, True]
    assert [claim.verdict for claim in report.check_claims(single)][4:6] == ["reported", "reported"]
    assert "1.00 (1.00 to 1.00) (packed, 4 at once against single documents)" in report.page(single)


def test_bfloat16_is_reported() -> None:
    results = make_results()
    peer = "grouped by length, 8 at once"
    assert verdicts(lost(results, "packed, 1 at once", peer, "bfloat16"))[:4] == [True, True, True, True]


def test_a_claim_without_measurements_is_not_measured() -> None:
    claims = report.check_claims(replace(make_results(), comparisons=[], losses=[]))
    assert {claim.verdict for claim in claims} == {"not measured"}


def test_the_page_holds_every_way_and_says_what_a_partial_run_lacks() -> None:
    results = make_results()
    text = report.page(results)
    assert "partial" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    num_comparisons = 2 * 6 + 1  # two of ours in float32 against six, and one in bfloat16
    assert len(lines) == 4 + 7 + num_comparisons + len(FULL.ways) + 2  # headers, claims, ..., losses
    float32 = make_results(FULL.with_precisions(["float32"]))
    assert "**A partial run**: not measured were transformers grouped by length, 8 at once, bfloat16; " in (
        report.page(float32)
    )
    assert "**A quick run**" in report.page(replace(results, is_quick=True))


def test_a_run_is_complete_only_when_all_of_it_is_there() -> None:
    results = make_results()
    assert command.is_complete(results)
    assert not command.is_complete(replace(results, is_quick=True))
    assert not command.is_complete(replace(results, losses=[]))
    *others, last = results.rows
    assert not command.is_complete(replace(results, rows=[*others, replace(last, rounds=2)]))
    float32 = make_results(FULL.with_precisions(["float32"]))
    assert not command.is_complete(float32)
    old = {**results.machine, "flags": ["avx2"]}  # where there is nothing else to measure
    assert command.is_complete(replace(float32, machine=old))


def test_only_complete_results_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(publishing, "REPOSITORY", tmp_path)
    whole = make_results()
    partial = replace(whole, rows=whole.rows[:-1])
    for name, results in (("whole", whole), ("partial", partial)):
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(results)))
    page = tmp_path / "docs" / "benchmarks-training.md"
    assert command.main(["--render", str(tmp_path / "partial.json")]) == 2
    assert not page.exists()
    assert command.main(["--render", str(tmp_path / "whole.json")]) == 0
    assert page.read_text() == report.page(whole)
    (tmp_path / "old.json").write_text(json.dumps({**asdict(whole), "format": 0}))
    with pytest.raises(ValueError, match=r"old\.json has format 0"):
        command.main(["--render", str(tmp_path / "old.json")])


def test_a_run_that_is_all_there_is_stored_and_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(publishing, "REPOSITORY", tmp_path)
    monkeypatch.setattr(publishing, "CACHE", tmp_path / "cache")
    whole = make_results()
    partial = replace(whole, rows=whole.rows[:-1])
    assert command.PUBLICATION.store(partial) == 0
    assert capsys.readouterr().out == report.page(partial) + "\n"
    name = f"2026-01-02-{slug('Some CPU')}-training.json"
    assert command.PUBLICATION.read(tmp_path / "cache" / "results" / name) == partial
    assert not (tmp_path / "docs" / "benchmarks-training.md").exists()
    assert command.PUBLICATION.store(whole) == 0
    assert command.PUBLICATION.read(tmp_path / "benchmarks" / "results" / name) == whole
    assert (tmp_path / "docs" / "benchmarks-training.md").read_text() == report.page(whole)


class FakeWorker:
    """Answers with losses, and remembers what it was asked."""

    def __init__(self, losses: Sequence[float], targets: int = 100) -> None:
        self.answer = {"losses": list(losses), "targets": targets}
        self.asked: list[dict[str, Any]] = []

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert op == "train"
        self.asked.append(arguments)
        return self.answer


def compared(ours: FakeWorker, padded: FakeWorker, flattened: FakeWorker) -> list[LossPair]:
    workers: Any = {
        way: ours if way.runtime == OURS else flattened if way.is_flattened else padded for way in FULL.ways
    }
    return compare_losses(FULL, workers, Path("pairs.jsonl"))


def test_each_kind_of_batches_is_given_our_documents_in_our_order_before_the_rounds() -> None:
    ours, padded, flattened = FakeWorker([10.0, 9.0]), FakeWorker([10.0, 9.00001]), FakeWorker([10.0, 9.0])
    found = [(pair.step, pair.upstream) for pair in compared(ours, padded, flattened)]
    assert sorted(found) == [(1, 10.0), (1, 10.0), (2, 9.0), (2, 9.00001)]
    for worker in (ours, padded, flattened):
        (asked,) = worker.asked
        assert (asked["documents"], asked["precision"], asked["steps"]) == ("pairs.jsonl", "float32", 2)
    assert [worker.asked[0]["is_flattened"] for worker in (padded, flattened)] == [False, True]
    assert padded.asked[0]["at_once"] > 1  # single documents would have no padding


BAD = [
    (FakeWorker([10.0, 9.001]), "do not train alike"),
    (FakeWorker([10.0, float("nan")]), "do not train alike"),
    (FakeWorker([10.0, 9.0], targets=99), "ours learns 100 tokens, upstream 99"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=["another loss", "no number", "other tokens"])
def test_sides_that_do_not_train_alike_end_the_run(bad: FakeWorker, message: str) -> None:
    good = FakeWorker([10.0, 9.0])
    for padded, flattened in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=message):
            compared(good, padded, flattened)


# Both sides


def test_a_quick_run_trains_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimi")
    if not hasattr(transformers, "ModernBertDecoderForCausalLM"):
        pytest.skip("this transformers has no such class")
    for module in (command, publishing):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    assert command.main(["--quick", "--threads", "1"]) == 0
    (path,) = (tmp_path / "results").iterdir()
    results = command.PUBLICATION.read(path)
    assert results.is_quick
    assert [(row.runtime, row.way) for row in results.rows] == [(way.runtime, way.name) for way in QUICK.ways]
    grouped, flattened, ours = results.rows
    assert ours.padding == flattened.padding == 0.0 < grouped.padding
    # Two sequences of 32 tokens; a document begins without being predicted.
    assert 64 - 8 <= ours.targets <= 64 - 2
    for row, name in ((grouped, GROUPED), (flattened, RANDOM)):
        documents = read_documents(tmp_path / "training" / f"{name}.jsonl")
        assert row.targets == sum(len(ids) + 1 for ids in documents)
    # Documents that saw each other in their row would come to another loss.
    assert [(pair.peer_way, pair.step) for pair in results.losses] == [
        (row.way, step) for row in (grouped, flattened) for step in (1, 2)
    ]
    assert results.losses[1].ours < results.losses[0].ours  # they learn
    assert all(pair.difference < measure.TOLERANCE for pair in results.losses)
    for comparison in results.comparisons:
        assert comparison.speed.median > 0
        assert comparison.memory.median > 0
        assert comparison.largest_memory > 0


def test_examples_in_docstrings_are_true() -> None:
    for module in (cases, epoch):
        assert doctest.testmod(module).failed == 0
