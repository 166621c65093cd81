"""The benchmark of the PyTorch classes: what is compared, how it is judged, and one tiny run of both."""

from __future__ import annotations

import doctest
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import publishing  # noqa: E402
from benchmarks.summary import Spread  # noqa: E402
from benchmarks.wing import __main__ as command  # noqa: E402
from benchmarks.wing import cases, measure, report  # noqa: E402
from benchmarks.wing.cases import (  # noqa: E402
    LOSS,
    OURS,
    QUICK,
    SIZES,
    TRAINING,
    UPSTREAM,
    Task,
    Way,
    tasks_of,
    workload_of,
)
from benchmarks.wing.measure import Comparison, Round, summarize  # noqa: E402


def make_round(task: Task, seconds: dict[Way, float], *, check: float = 1.0, slow: float = 1.0) -> Round:
    answers: list[dict[str, Any]] = [
        {
            "seconds": slow * seconds[way],
            "check": check,
            "growth_bytes": 100_000_000 if way.runtime == UPSTREAM else 40_000_000,
            "peak_memory_bytes": 10**9,
        }
        for way in task.ways
    ]
    return Round(answers, others_share=0.0, seconds=1.0)


def training() -> Task:
    return next(task for task in tasks_of(workload_of("17m")) if task.name == TRAINING)


def make_results(ratio: float = 2.0, memory: float = 0.4) -> report.WingResults:
    comparisons, rows = [], []
    for size in SIZES:
        for task in tasks_of(workload_of(size)):
            seconds = {way: ratio if way.runtime == UPSTREAM else 1.0 for way in task.ways}
            measured = summarize(size, task, [make_round(task, seconds)], make_round(task, seconds))
            rows += measured.rows
            comparisons += [replace(each, memory=memory) for each in measured.comparisons]
    return report.WingResults(
        format=report.FORMAT,
        date="2026-01-02",
        machine={
            "cpu": "Some CPU",
            "flags": [],
            "logical_processors": 2,
            "memory_gib": 8.0,
            "system": "Linux x86_64",
        },
        threads=2,
        versions={"python": "3.11.0"},
        others_share=Spread(0.01, 0.0, 0.2),
        is_quick=False,
        rows=rows,
        comparisons=comparisons,
        notes=["A note."],
    )


def test_every_way_of_ours_meets_upstreams_of_its_layout_and_packing_also_meets_padding() -> None:
    task = training()
    names = {(task.way_name(ours), task.way_name(upstream)) for ours, upstream in task.pairs()}
    assert names == {
        ("padded", "padded"),
        ("padded, skip_logits", "padded"),
        ("packed", "packed"),
        ("packed, skip_logits", "packed"),
        ("packed, skip_logits", "padded"),
    }


def test_packed_and_padded_steps_count_the_same_tokens() -> None:
    task = training()
    assert task.tokens == sum(task.arguments["lengths"])
    assert len(set(task.arguments["lengths"])) == len(task.arguments["lengths"])  # mixed


def test_ratios_are_taken_within_each_round_and_rates_from_the_median() -> None:
    task = training()
    seconds = {way: 3.0 if way.runtime == UPSTREAM else 1.5 for way in task.ways}
    rounds = [make_round(task, seconds, slow=slow) for slow in (1.0, 10.0, 2.0)]
    measured = summarize("17m", task, rounds, make_round(task, seconds, slow=100.0))
    assert all(each.ratio == Spread(2.0, 2.0, 2.0) for each in measured.comparisons)
    assert all(each.memory == pytest.approx(0.4) for each in measured.comparisons)
    ours = next(row for row in measured.rows if row.runtime == OURS)
    assert ours.seconds == Spread(3.0, 1.5, 15.0)
    assert ours.tokens_per_second == pytest.approx(task.tokens / 3.0)


def test_memory_is_not_compared_where_hardly_any_comes_and_goes() -> None:
    task = training()
    done = make_round(task, dict.fromkeys(task.ways, 1.0))
    for answer in done.answers:
        answer["growth_bytes"] = 1000
    assert {each.memory for each in summarize("17m", task, [done], done).comparisons} == {None}


def test_ways_that_come_to_different_losses_end_the_run() -> None:
    task = training()
    done = make_round(task, dict.fromkeys(task.ways, 1.0))
    done.answers[-1]["check"] = 1.001
    with pytest.raises(ValueError, match=r"17m, training step.*1\.001"):
        summarize("17m", task, [done], done)


def test_verdicts_turn_at_the_numbers_to_hold() -> None:
    held = report.check_claims(make_results(ratio=1.3, memory=0.5))
    assert [claim.verdict for claim in held] == ["held"] * 5
    lost = report.check_claims(make_results(ratio=0.96, memory=0.51))
    assert [claim.verdict for claim in lost] == ["**not held**"] * 5
    between = report.check_claims(make_results(ratio=0.97, memory=0.5))
    assert [claim.is_held for claim in between] == [False, False, True, True, True]


def test_the_training_claim_is_about_equal_batches_of_17m_only() -> None:
    results = make_results(ratio=2.0)

    def slow(each: Comparison, condition: bool) -> Comparison:
        return replace(each, ratio=Spread(1.0, 1.0, 1.0)) if condition else each

    crossed = [
        slow(each, each.way.startswith("packed") and each.peer_way == "padded")
        for each in results.comparisons
    ]
    larger = [slow(each, each.size != "17m") for each in results.comparisons]
    equal = [slow(each, (each.size, each.task, each.way) == ("17m", TRAINING, "packed")) for each in crossed]
    for comparisons, expected in ((crossed, True), (larger, True), (equal, False)):
        claims = report.check_claims(replace(results, comparisons=comparisons))
        assert claims[1].is_held is expected


def test_a_claim_without_measurements_is_not_measured() -> None:
    claims = report.check_claims(replace(make_results(), comparisons=[]))
    assert {claim.verdict for claim in claims} == {"not measured"}


def test_the_page_holds_every_row_and_note() -> None:
    results = make_results()
    text = report.page(results)
    assert "A note." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 + 5 + len(results.comparisons) + len(results.rows)  # three headers, five claims
    assert "128, 256, 384" in text  # the lengths of 17m's texts
    assert f"| 17m | {LOSS} | skip_logits |" in text


def test_a_run_is_published_only_when_all_of_it_is_there() -> None:
    results = make_results()
    assert command.is_complete(results)
    assert not command.is_complete(replace(results, is_quick=True))
    assert not command.is_complete(replace(results, rows=results.rows[:-2]))


def test_batches_hold_the_same_texts_padded_and_packed() -> None:
    pytest.importorskip("torch")
    from benchmarks.wing.torch_worker import packed_batch, padded_batch

    padded, packed = padded_batch([3, 5]), packed_batch([3, 5])
    is_token = padded["attention_mask"].bool()
    assert is_token.sum(1).tolist() == [3, 5]
    assert padded["input_ids"][is_token].tolist() == packed["input_ids"][0].tolist()
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert (padded["labels"][~is_token] == -100).all()
    # The model shifts labels: what counts are those after the first of each text.
    assert (padded["labels"][:, 1:] != -100).sum() == (packed["labels"][:, 1:] != -100).sum() == 2 + 4


def test_texts_that_differ_in_one_token_or_in_the_order_of_two_end_the_run() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.wing.torch_worker import TorchWorker

    class Saying:
        """A model that generates what it is told."""

        def __init__(self, new: list[list[int]]) -> None:
            self.new = new

        def eval(self) -> None:
            """Nothing to switch."""

        def generate(self, ids: Any, **_: Any) -> Any:
            return torch.cat([ids, torch.tensor(self.new)], 1)

    def check(new: list[list[int]]) -> float:
        worker = TorchWorker()
        worker.model = Saying(new)
        options = {"is_packed": False, "skips_logits": False}
        return worker.generate(sequences=2, tokens=5, new_tokens=3, **options)["check"]

    task = next(task for task in tasks_of(QUICK) if task.name.startswith("generate"))
    said = [[50_000, 41, 7], [9, 50_001, 3]]
    measure.check_agreement("17m", task, [check(said), check(said)])
    for other in ([[50_000, 41, 8], said[1]], [[41, 50_000, 7], said[1]], said[::-1]):
        with pytest.raises(ValueError, match="the ways came to different results"):
            measure.check_agreement("17m", task, [check(said), check(other)])


def test_a_quick_run_measures_both_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ModernBertDecoderForCausalLM"):
        pytest.skip("this transformers has no such class")
    monkeypatch.setattr(publishing, "CACHE", tmp_path)
    assert command.main(["--quick", "--threads", "1"]) == 0
    (path,) = (tmp_path / "results").iterdir()
    results = command.PUBLICATION.read(path)
    assert {(row.runtime, row.task) for row in results.rows} == {
        (runtime, task.name) for runtime in (OURS, UPSTREAM) for task in tasks_of(QUICK)
    }
    assert results.is_quick
    assert all(each.ratio.median > 0 for each in results.comparisons)


def test_examples_in_docstrings_are_true() -> None:
    for module in (cases, measure):
        assert doctest.testmod(module).failed == 0
