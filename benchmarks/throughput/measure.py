"""Interleaved rounds: all workers of a size loaded at once, each corpus measured A B C A B C.

The first round warms up and is dropped. transformers' batch size is searched beforehand on a part of the
texts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.protocol import Worker
from benchmarks.summary import ENGINE, TRANSFORMERS, Spread
from benchmarks.throughput.corpora import CORPORA, Corpus
from benchmarks.throughput.models import ensure_classifier

ENGINE_DTYPES = ("float32", "int8", "w8a8")
_BATCH_SIZES = {"short": (1, 8, 32, 128), "medium": (1, 8, 32, 128), "long": (1, 2, 4)}
# Texts that the search for the best batch size looks at: enough for two of the largest batches.
_SEARCH_TEXTS = {"short": 256, "medium": 256, "long": 8}
_SEARCH_TRIES = 3
_SETTLE_SECONDS = 0.05
_MEMORY_DTYPE = "int8"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One runtime on one corpus.

    Attributes:
        documents_per_second: over the rounds.
        ratio: transformers' seconds over this runtime's, within each round; None for transformers itself.
        peak_memory_bytes: of the process during the row.
        agreement: share of the labels that equal those of transformers.
        batch_size: the best one that was found; None for the engine, which has none to choose.
        bandwidth: bytes per second at which memory was read before each round.
    """

    runtime: str
    variant: str
    size: str
    corpus: str
    num_texts: int
    rounds: int
    documents_per_second: Spread
    ratio: Spread | None
    peak_memory_bytes: int
    agreement: float
    batch_size: int | None
    bandwidth: Spread


@dataclass(frozen=True)
class MemorySample:
    """Resident bytes after so many texts."""

    texts: int
    bytes: int


@dataclass(frozen=True)
class MemoryLine:
    """Memory while many texts pass through one call."""

    variant: str
    size: str
    count: int
    seconds: float
    samples: list[MemorySample]


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    threads: int
    rounds: int
    folder: Path
    shared: Path


@dataclass(frozen=True)
class _Loaded:
    runtime: str
    variant: str
    worker: Worker
    answer: dict[str, Any]


@dataclass(frozen=True)
class Peers:
    """What takes turns in a round, and what measures the memory before each."""

    workers: list[_Loaded]
    bandwidth: Worker


def load_workers(size: str, plan: Plan, stack: ExitStack, report: Report) -> Peers:
    """The engine in each dtype, and transformers, with the classifier of this size."""
    model = str(ensure_classifier(size, plan.folder, plan.shared))
    wanted: list[tuple[str, str, Callable[[Plan], Worker]]] = [
        (ENGINE, dtype, _engine_worker) for dtype in ENGINE_DTYPES
    ]
    wanted.append((TRANSFORMERS, "float32", _pipeline_worker))
    loaded = []
    for runtime, variant, start in wanted:
        report(f"{size}: loading {runtime} {variant}")
        worker = stack.enter_context(start(plan))
        answer = worker.ask("load", model=model, variant=variant, threads=plan.threads)
        loaded.append(_Loaded(runtime, variant, worker, answer))
    return Peers(loaded, stack.enter_context(_worker("benchmarks.bandwidth", plan)))


def _engine_worker(plan: Plan) -> Worker:
    return _worker("benchmarks.throughput.engine_worker", plan)


def _pipeline_worker(plan: Plan) -> Worker:
    return _worker("benchmarks.throughput.pipeline_worker", plan)


def _worker(module: str, plan: Plan) -> Worker:
    environment = {"MBD_CACHE": str(plan.folder / "engine"), "OMP_NUM_THREADS": str(plan.threads)}
    return Worker([sys.executable, "-m", module], environment=environment)


def measure_corpus(corpus: Corpus, size: str, peers: Peers, plan: Plan, report: Report) -> list[Row]:
    """All workers on one corpus."""
    workers = peers.workers
    texts = corpus.texts(plan.shared, size)
    path = _write(plan.folder / f"texts-{corpus.name}-{size}.json", texts)
    batch_size = _best_batch_size(corpus, size, texts, workers[-1], plan)
    arguments = [
        {"texts": str(path)} | ({"batch_size": batch_size} if each.runtime == TRANSFORMERS else {})
        for each in workers
    ]
    _round(peers, arguments, plan)
    rounds: list[Round] = []
    while sum(each.is_quiet for each in rounds) < plan.rounds and len(rounds) < MOST_REPEATS * plan.rounds:
        rounds.append(_round(peers, arguments, plan))
        report(f"{size}, {corpus.name}: round {len(rounds)}, {rounds[-1].seconds:.1f} s")
    rounds = sorted(rounds, key=lambda each: each.others_share or 0.0)[: plan.rounds]
    return [make_row(each, i, corpus.name, size, rounds, batch_size) for i, each in enumerate(workers)]


def make_row(
    loaded: _Loaded,
    index: int,
    corpus: str,
    size: str,
    rounds: Sequence[Round],
    batch_size: int,
) -> Row:
    """The row of worker `index`; the last worker of each round is transformers'."""
    answers = [done.answers for done in rounds]
    labels, reference = answers[0][index]["labels"], answers[0][-1]["labels"]
    is_peer = loaded.runtime == TRANSFORMERS
    return Row(
        runtime=loaded.runtime,
        variant=loaded.variant,
        size=size,
        corpus=corpus,
        num_texts=len(labels),
        rounds=len(rounds),
        documents_per_second=Spread.of(len(labels) / each[index]["seconds"] for each in answers),
        ratio=None
        if is_peer
        else Spread.of(each[-1]["seconds"] / each[index]["seconds"] for each in answers),
        peak_memory_bytes=max(each[index]["peak_memory_bytes"] for each in answers),
        agreement=sum(a == b for a, b in zip(labels, reference, strict=True)) / len(labels),
        batch_size=batch_size if is_peer else None,
        bandwidth=Spread.of(done.bandwidth for done in rounds),
    )


def measure_memory(size: str, plan: Plan, count: int, report: Report) -> MemoryLine:
    """The engine's resident memory over `count` short texts in one call, in a process of its own."""
    report(f"{size}: memory over {count:,} texts")
    path = _write(plan.folder / f"texts-memory-{size}.json", CORPORA[0].texts(plan.shared, size))
    with _engine_worker(plan) as worker:
        model = str(ensure_classifier(size, plan.folder, plan.shared))
        worker.ask("load", model=model, variant=_MEMORY_DTYPE, threads=plan.threads)
        answer = worker.ask("memory", texts=str(path), count=count)
    samples = [MemorySample(**each) for each in answer["samples"]]
    return MemoryLine(_MEMORY_DTYPE, size, count, answer["seconds"], samples)


@dataclass(frozen=True)
class Round:
    """Every worker's answer, what other programs took meanwhile, and the memory's speed before."""

    answers: Sequence[Mapping[str, Any]]
    others_share: float | None
    seconds: float
    bandwidth: float

    @property
    def is_quiet(self) -> bool:
        return is_quiet(self.others_share)


def _round(peers: Peers, arguments: Sequence[dict[str, Any]], plan: Plan) -> Round:
    workers = peers.workers
    rate = peers.bandwidth.ask("measure", threads=plan.threads)["bytes_per_second"]
    start = time.monotonic()
    meter = ContentionMeter([each.worker.process.pid for each in workers])
    answers = []
    for each, given in zip(workers, arguments, strict=True):
        time.sleep(_SETTLE_SECONDS)
        answers.append(each.worker.ask("classify", **given))
    return Round(answers, meter.share(), time.monotonic() - start, rate)


def _best_batch_size(corpus: Corpus, size: str, texts: list[str], pipeline: _Loaded, plan: Plan) -> int:
    part = texts[: _SEARCH_TEXTS[corpus.name]]
    path = _write(plan.folder / f"texts-search-{corpus.name}-{size}.json", part)
    sizes = _BATCH_SIZES[corpus.name]
    answer = pipeline.worker.ask("best_batch_size", texts=str(path), sizes=sizes, tries=_SEARCH_TRIES)
    return int(answer["batch_size"])


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path
