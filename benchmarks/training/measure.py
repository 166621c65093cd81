"""Interleaved rounds: every way in a process of its own, trained from the same weights, A B C A B C.

The first round warms up and is dropped. Before all rounds both sides train on the same documents and must
come to the same losses.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter
from benchmarks.peers import model_folder
from benchmarks.protocol import Worker
from benchmarks.summary import Spread
from benchmarks.training.cases import OURS, SIZE, UPSTREAM, Way, Workload, pairs
from benchmarks.training.documents import write_documents, write_pairs
from benchmarks.wing.measure import Round, quietest

_SETTLE_SECONDS = 0.05
# Relative, of losses in float32: sums in another order, and every step begins with the last one's difference.
TOLERANCE = 1e-3
_MODULES = {OURS: "benchmarks.training.packed_worker", UPSTREAM: "benchmarks.training.padded_worker"}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One way, over the rounds.

    Attributes:
        at_once: documents, or packed sequences, of a micro-batch.
        steps: of a round.
        targets: useful tokens of a round: those that are predicted.
        padding: share of the computed positions that hold padding.
        seconds: of a round.
        tokens_per_second: useful ones.
        growth_bytes: peak of the process above what it held before there was a model; the median.
        peak_memory_bytes: of the process, the largest.
        last_loss: of the last step.
    """

    runtime: str
    way: str
    precision: str
    at_once: int
    steps: int
    targets: int
    padding: float
    rounds: int
    seconds: Spread
    tokens_per_second: Spread
    growth_bytes: float
    peak_memory_bytes: int
    last_loss: float


@dataclass(frozen=True)
class Comparison:
    """Ours against one of upstream's ways.

    Attributes:
        peer_at_once: documents of upstream's micro-batches.
        speed: our useful tokens per second over theirs, within each round; above 1 we win.
        memory: our growth over theirs, within each round; below 1 we win.
    """

    precision: str
    peer_way: str
    peer_at_once: int
    speed: Spread
    memory: Spread


@dataclass(frozen=True)
class LossPair:
    """The losses of both sides at one step on the same documents."""

    step: int
    ours: float
    upstream: float

    @property
    def difference(self) -> float:
        """Relative to upstream's."""
        return abs(self.ours - self.upstream) / abs(self.upstream)


@dataclass(frozen=True)
class Measured:
    """A run after all its rounds."""

    rows: list[Row]
    comparisons: list[Comparison]
    losses: list[LossPair]
    others_shares: list[float]
    versions: dict[str, str]


def measure(load: Workload, folder: Path, *, rounds: int, threads: int, report: Report) -> Measured:
    """All ways of a workload; documents are written into the folder.

    Raises:
        ValueError: the two sides do not train alike.
    """
    documents = write_documents(folder / "documents.jsonl", load)
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[Way, Worker] = {}
        for way in load.ways:
            report(f"starting {way.runtime}, {way.name}, {way.precision}")
            workers[way] = stack.enter_context(_worker(way, threads))
            answer = workers[way].ask("load", model=str(model_folder(SIZE)), threads=threads)
            versions.update(answer["versions"])
        losses = compare_losses(load, workers, write_pairs(folder / "pairs.jsonl", load))
        report(f"the same losses within {max(pair.difference for pair in losses):.1e}")
        done = _rounds(load, workers, documents, rounds=rounds, report=report)
    shares = [each.others_share for each in done if each.others_share is not None]
    return Measured(*summarize(load, done), losses, shares, versions)


def compare_losses(load: Workload, workers: Mapping[Way, Worker], documents: Path) -> list[LossPair]:
    """The losses of both sides, step by step, on the same documents in the same order, in float32.

    Raises:
        ValueError: they differ.
    """
    ours, upstream = next(pairs(way for way in load.ways if way.precision == "float32"))
    common = {"documents": str(documents), "precision": "float32", "steps": load.check_steps}
    found = workers[ours].ask("train", **common, **_ours(load, ours), is_in_order=True)
    expected = workers[upstream].ask(
        "train", **common, **{**_upstream(load, upstream), "sampling": "sequential"}
    )
    if found["targets"] != expected["targets"]:
        raise ValueError(
            f"ours learns {found['targets']} tokens, upstream {expected['targets']}: not the same"
        )
    both = enumerate(zip(found["losses"], expected["losses"], strict=True), start=1)
    losses = [LossPair(step, *pair) for step, pair in both]
    if len(losses) != load.check_steps or not all(pair.difference <= TOLERANCE for pair in losses):
        raise ValueError(f"the two sides do not train alike: {losses}")
    return losses


def arguments_of(load: Workload, way: Way, documents: Path) -> dict[str, Any]:
    """What the worker of a way is told for a round."""
    own = _ours(load, way) if way.runtime == OURS else _upstream(load, way)
    return {"documents": str(documents), "precision": way.precision, "steps": load.steps, **own}


def summarize(load: Workload, rounds: Sequence[Round]) -> tuple[list[Row], list[Comparison]]:
    """Rows of all ways, and comparisons of ours with upstream's; ratios are taken within each round."""
    answers = {way: [each.answers[i] for each in rounds] for i, way in enumerate(load.ways)}
    rows = [_row(load, way, each) for way, each in answers.items()]
    comparisons = [
        Comparison(
            precision=ours.precision,
            peer_way=upstream.name,
            peer_at_once=upstream.at_once,
            speed=_ratio(answers[ours], answers[upstream], _rate),
            memory=_ratio(answers[ours], answers[upstream], lambda answer: answer["growth_bytes"]),
        )
        for ours, upstream in pairs(load.ways)
    ]
    return rows, comparisons


def _worker(way: Way, threads: int) -> Worker:
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return Worker([sys.executable, "-m", _MODULES[way.runtime]], environment=environment)


def _rounds(
    load: Workload, workers: Mapping[Way, Worker], documents: Path, *, rounds: int, report: Report
) -> list[Round]:
    _round(load, workers, documents)
    done: list[Round] = []
    while sum(each.is_quiet for each in done) < rounds and len(done) < MOST_REPEATS * rounds:
        done.append(_round(load, workers, documents))
        rates = ", ".join(f"{_rate(answer):,.0f}" for answer in done[-1].answers)
        report(f"round {len(done)}, {done[-1].seconds:.0f} s: {rates} useful tokens/s")
    return quietest(done, rounds)


def _round(load: Workload, workers: Mapping[Way, Worker], documents: Path) -> Round:
    start = time.monotonic()
    meter = ContentionMeter([each.process.pid for each in workers.values()])
    answers = []
    for way in load.ways:
        time.sleep(_SETTLE_SECONDS)
        answers.append(workers[way].ask("train", **arguments_of(load, way, documents)))
    return Round(answers, meter.share(), time.monotonic() - start)


def _ours(load: Workload, way: Way) -> dict[str, Any]:
    return {
        "sequence_length": load.sequence_length,
        "sequences_per_step": load.sequences_per_step,
        "at_once": way.at_once,
    }


def _upstream(load: Workload, way: Way) -> dict[str, Any]:
    own = {"sampling": way.sampling, "at_once": way.at_once}
    return own | {"documents_per_step": load.documents_per_step}


def _row(load: Workload, way: Way, answers: Sequence[Mapping[str, Any]]) -> Row:
    first = answers[0]
    return Row(
        runtime=way.runtime,
        way=way.name,
        precision=way.precision,
        at_once=way.at_once,
        steps=load.steps,
        targets=first["targets"],
        padding=first["padding"] / first["positions"],
        rounds=len(answers),
        seconds=Spread.of(answer["seconds"] for answer in answers),
        tokens_per_second=Spread.of(map(_rate, answers)),
        growth_bytes=statistics.median(answer["growth_bytes"] for answer in answers),
        peak_memory_bytes=max(answer["peak_bytes"] for answer in answers),
        last_loss=first["losses"][-1],
    )


def _rate(answer: Mapping[str, Any]) -> float:
    rate: float = answer["targets"] / answer["seconds"]
    return rate


def _ratio(
    ours: Sequence[Mapping[str, Any]],
    upstream: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
) -> Spread:
    return Spread.of(value(a) / value(b) for a, b in zip(ours, upstream, strict=True))
