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

from benchmarks.summary import Spread  # noqa: E402
from benchmarks.training import __main__ as command  # noqa: E402
from benchmarks.training import cases, measure, report  # noqa: E402
from benchmarks.training.cases import FULL, OURS, QUICK, UPSTREAM, Way, Workload, pairs  # noqa: E402
from benchmarks.training.documents import read_documents, write_documents, write_pairs  # noqa: E402
from benchmarks.training.measure import LossPair, compare_losses, summarize  # noqa: E402
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
    rows, comparisons = summarize(load, rounds)
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
        bandwidth=None,
        others_share=Spread(0.01, 0.0, 0.2),
        is_quick=False,
        rows=rows,
        comparisons=comparisons,
        losses=[LossPair(1, 10.9, 10.9), LossPair(2, 10.8, 10.8001)],
    )


# What is compared


def test_ours_meets_every_way_of_upstreams_in_its_precision() -> None:
    found = {(ours.precision, upstream.name) for ours, upstream in pairs(FULL.ways)}
    upstream = {(way.precision, way.name) for way in FULL.ways if way.runtime == UPSTREAM}
    assert found == upstream
    assert {name for precision, name in found if precision == "float32"} == {
        "random order",
        "grouped by length",
        "single documents",
    }


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
    assert len(ways) == 4


# How it is judged


def test_ratios_are_of_useful_tokens_per_second_within_each_round() -> None:
    results = make_results(speed=2.0, memory=0.4)
    for each in results.comparisons:
        assert each.speed == Spread(*[pytest.approx(2.0)] * 3)  # whatever the round's own pace
        assert each.memory == Spread(*[pytest.approx(0.4)] * 3)
    ours = next(row for row in results.rows if row.runtime == OURS)
    assert ours.tokens_per_second == Spread(500.0, 100.0, 1000.0)
    assert ours.seconds == Spread(6.0, 3.0, 30.0)
    padded = next(row for row in results.rows if row.runtime == UPSTREAM)
    assert (ours.padding, padded.padding) == (0.0, 0.2)


def verdicts(results: report.TrainingResults) -> list[bool | None]:
    return [claim.is_held for claim in report.check_claims(results)]


def test_verdicts_turn_at_the_numbers_to_hold() -> None:
    assert verdicts(make_results(speed=1.51, memory=0.59)) == [True, True, None, None, True]
    assert verdicts(make_results(speed=1.49, memory=0.61)) == [False, False, None, None, True]
    results = make_results()
    assert verdicts(replace(results, losses=[LossPair(1, 10.0, 10.02)]))[-1] is False


def test_the_better_of_upstreams_batches_decides_and_single_documents_are_reported() -> None:
    results = make_results(speed=2.0, memory=0.4)

    def with_one(name: str, precision: str = "float32") -> report.TrainingResults:
        lost = Spread(1.0, 1.0, 1.0)
        changed = [
            replace(each, speed=lost, memory=lost)
            if (each.peer_way, each.precision) == (name, precision)
            else each
            for each in results.comparisons
        ]
        return replace(results, comparisons=changed)

    for name in ("random order", "grouped by length"):
        assert verdicts(with_one(name))[:2] == [False, False]
    single = with_one("single documents")
    assert verdicts(single) == [True, True, None, None, True]
    assert [claim.verdict for claim in report.check_claims(single)][2:4] == ["reported", "reported"]
    assert "1.00 (1.00 to 1.00) (single documents)" in report.page(single)
    assert verdicts(with_one("grouped by length", "bfloat16"))[:2] == [True, True]


def test_a_claim_without_measurements_is_not_measured() -> None:
    claims = report.check_claims(replace(make_results(), comparisons=[], losses=[]))
    assert {claim.verdict for claim in claims} == {"not measured"}


def test_the_page_holds_every_way_and_says_what_a_partial_run_lacks() -> None:
    results = make_results()
    text = report.page(results)
    assert "partial" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 + 5 + 4 + len(FULL.ways) + 2  # headers, claims, comparisons, ways, losses
    float32 = make_results(FULL.with_precisions(["float32"]))
    assert "**A partial run**: not measured were transformers grouped by length, bfloat16; " in report.page(
        float32
    )
    assert "**A quick run**" in report.page(replace(results, is_quick=True))


def test_a_run_is_complete_only_when_all_of_it_is_there() -> None:
    results = make_results()
    assert command.is_complete(results)
    assert not command.is_complete(replace(results, is_quick=True))
    assert not command.is_complete(replace(results, losses=[]))
    float32 = make_results(FULL.with_precisions(["float32"]))
    assert not command.is_complete(float32)
    old = {**results.machine, "flags": ["avx2"]}  # where there is nothing else to measure
    assert command.is_complete(replace(float32, machine=old))


def test_only_complete_results_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    whole = make_results()
    partial = replace(whole, rows=whole.rows[:-1])
    for name, results in (("whole", whole), ("partial", partial)):
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(results)))
    page = tmp_path / "docs" / "training-benchmarks.md"
    assert command.main(["--render", str(tmp_path / "partial.json")]) == 2
    assert not page.exists()
    assert command.main(["--render", str(tmp_path / "whole.json")]) == 0
    assert page.read_text() == report.page(whole)
    (tmp_path / "old.json").write_text(json.dumps({**asdict(whole), "format": 0}))
    with pytest.raises(ValueError, match=r"old\.json has format 0"):
        command.main(["--render", str(tmp_path / "old.json")])


class FakeWorker:
    """Answers with losses, and remembers what it was asked."""

    def __init__(self, losses: Sequence[float], targets: int = 100) -> None:
        self.answer = {"losses": list(losses), "targets": targets}
        self.asked: dict[str, Any] = {}

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert op == "train"
        self.asked = arguments
        return self.answer


def compared(ours: FakeWorker, upstream: FakeWorker) -> list[LossPair]:
    workers: Any = {way: ours if way.runtime == OURS else upstream for way in FULL.ways}
    return compare_losses(FULL, workers, Path("pairs.jsonl"))


def test_both_sides_are_given_the_same_documents_in_the_same_order_before_the_rounds() -> None:
    ours, upstream = FakeWorker([10.0, 9.0]), FakeWorker([10.0, 9.001])
    assert [pair.step for pair in compared(ours, upstream)] == [1, 2]
    assert ours.asked["documents"] == upstream.asked["documents"] == "pairs.jsonl"
    assert (ours.asked["is_in_order"], upstream.asked["sampling"]) == (True, "sequential")
    assert ours.asked["precision"] == upstream.asked["precision"] == "float32"


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (FakeWorker([10.0, 9.02]), "do not train alike"),
        (FakeWorker([10.0, float("nan")]), "do not train alike"),
        (FakeWorker([10.0, 9.0], targets=99), "ours learns 99 tokens, upstream 100"),
    ],
    ids=["another loss", "no number", "other tokens"],
)
def test_sides_that_do_not_train_alike_end_the_run(ours: FakeWorker, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(ours, FakeWorker([10.0, 9.0]))


# Both sides


def test_a_quick_run_trains_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimi")
    if not hasattr(transformers, "ModernBertDecoderForCausalLM"):
        pytest.skip("this transformers has no such class")
    monkeypatch.setattr(command, "CACHE", tmp_path)
    assert command.main(["--quick", "--threads", "1"]) == 0
    (path,) = (tmp_path / "results").iterdir()
    results = command.load_results(path)
    assert results.is_quick
    assert {(row.runtime, row.way) for row in results.rows} == {(way.runtime, way.name) for way in QUICK.ways}
    ours, upstream = (next(row for row in results.rows if row.runtime == name) for name in (OURS, UPSTREAM))
    assert ours.padding == 0.0 < upstream.padding
    # Two sequences of 32 tokens; a document begins without being predicted.
    assert 64 - 8 <= ours.targets <= 64 - 2
    documents = read_documents(tmp_path / "training" / "documents.jsonl")
    assert upstream.targets >= 4 * (min(map(len, documents)) + 1)
    assert [pair.step for pair in results.losses] == [1, 2]
    assert results.losses[1].ours < results.losses[0].ours  # they learn
    assert all(pair.difference < measure.TOLERANCE for pair in results.losses)
    (comparison,) = results.comparisons
    assert comparison.speed.median > 0
    assert comparison.memory.median > 0


def test_examples_in_docstrings_are_true() -> None:
    assert doctest.testmod(cases).failed == 0
