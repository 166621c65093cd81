"""Interleaved rounds: every way in a process of its own, trained from the same weights, A B C A B C.

Before the rounds both sides train on the same documents and must come to the same losses; after them each
way trains on its largest batch, for memory. Knows how batches are chosen from benchmarks/training/epoch.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter
from benchmarks.peers import model_folder
from benchmarks.protocol import Worker
from benchmarks.summary import Spread
from benchmarks.training.cases import GROUPED, OURS, RANDOM, SIZE, UPSTREAM, Way, Workload, pairs
from benchmarks.training.documents import NUM_FRAMING, read_documents, write, write_documents, write_pairs
from benchmarks.training.epoch import batches_of, extremes, typical
from benchmarks.wing.measure import Round, quietest

_SETTLE_SECONDS = 0.05
# Relative, of losses in float32: sums in another order come to a hundredth of it. Random weights hardly look
# at the context, so documents that see each other change a loss by no more than a few times as much.
TOLERANCE = 1e-5
_MODULES = {OURS: "benchmarks.training.packed_worker", UPSTREAM: "benchmarks.training.upstream_worker"}

# The first warms the optimizer up: it allocates its state at the end of a step.
_EXTREME_STEPS = 2

Report = Callable[[str], None]
# From the lengths of the documents of an epoch to their order.
LengthGroups = Callable[[list[int]], list[int]]


@dataclass(frozen=True)
class Files:
    """Documents of one way, in the order in which it trains on them.

    Attributes:
        typical: of the timed steps; documents of the mean length in the mean.
        extreme: of a step of the smallest batch of the epoch and one of the largest.
    """

    typical: Path
    extreme: Path


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
        largest_growth_bytes: the same on the largest batch of the epoch, once.
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
    largest_growth_bytes: int
    peak_memory_bytes: int
    last_loss: float


@dataclass(frozen=True)
class Comparison:
    """One of our ways against one of upstream's.

    Attributes:
        tokens_at_once: of our micro-batches.
        peer_tokens_at_once: of upstream's, in the mean.
        peer_at_once: documents of upstream's micro-batches.
        speed: our useful tokens per second over theirs, within each round; above 1 we win.
        memory: our growth over theirs, within each round; below 1 we win.
        largest_memory: the same where each trains on its largest batch.
    """

    precision: str
    way: str
    peer_way: str
    tokens_at_once: int
    peer_tokens_at_once: int
    peer_at_once: int
    speed: Spread
    memory: Spread
    largest_memory: float


@dataclass(frozen=True)
class LossPair:
    """The losses of both sides at one step on the same documents."""

    peer_way: str
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
        files = write_files(load, folder, partial(_length_groups, load, workers))
        _round(load, workers, _extreme(files), steps=1)  # warms up
        done = _rounds(load, workers, files, rounds=rounds, report=report)
        report("the largest batches")
        largest = _round(load, workers, _extreme(files), steps=_EXTREME_STEPS)
    shares = [each.others_share for each in done if each.others_share is not None]
    return Measured(*summarize(load, done, largest), losses, shares, versions)


def write_files(load: Workload, folder: Path, length_groups: LengthGroups) -> dict[Way, Files]:
    """What each way trains on: batches of an epoch of the same documents, chosen alike for all.

    Ours gets the documents of the batches in random order, one after the other, and those that are left, so
    that it never runs out of them.
    """
    documents = read_documents(write_documents(folder / "documents.jsonl", load))
    lengths = [len(ids) + NUM_FRAMING for ids in documents]
    orders = {RANDOM: list(range(len(documents)))}  # they were drawn at random
    if any(way.order == GROUPED for way in load.ways):
        orders[GROUPED] = length_groups(lengths)

    def written(name: str, batches: Iterable[Iterable[int]]) -> Path:
        return write(folder / f"{name}.jsonl", (documents[i] for batch in batches for i in batch))

    epochs = {order: batches_of(indices, load.documents_per_step) for order, indices in orders.items()}
    chosen = {order: typical(batches, lengths, load.steps) for order, batches in epochs.items()}
    taken = {i for batch in chosen[RANDOM] for i in batch}
    packed = written("packed", [*chosen[RANDOM], (i for i in orders[RANDOM] if i not in taken)])
    paths = {order: written(order, batches) for order, batches in chosen.items()}
    files = {}
    for number, way in enumerate(load.ways):
        if way.runtime == OURS:
            files[way] = Files(packed, packed)
        else:
            extreme = extremes(way, epochs[way.order], lengths)
            files[way] = Files(paths[way.order], written(f"extreme-{number}", extreme))
    return files


def compare_losses(load: Workload, workers: Mapping[Way, Worker], documents: Path) -> list[LossPair]:
    """The losses of both sides, step by step, on the same documents in the same order, in float32.

    Raises:
        ValueError: they differ.
    """
    float32 = [way for way in load.ways if way.precision == "float32"]
    ours = next(way for way in float32 if way.runtime == OURS)
    # One way for each kind of batches: padded, flattened. Single documents are of neither.
    kinds = {way.is_flattened: way for way in float32 if way.runtime == UPSTREAM and way.at_once > 1}
    found = workers[ours].ask("train", **arguments_of(load, ours, documents, steps=load.check_steps))
    losses = []
    for upstream in kinds.values():
        asked = arguments_of(load, upstream, documents, steps=load.check_steps)
        expected = workers[upstream].ask("train", **asked)
        if found["targets"] != expected["targets"]:
            raise ValueError(
                f"ours learns {found['targets']} tokens, upstream {expected['targets']}: not the same"
            )
        both = enumerate(zip(found["losses"], expected["losses"], strict=True), start=1)
        losses += [LossPair(upstream.name, step, *pair) for step, pair in both]
    if len(losses) != load.check_steps * len(kinds) or not all(
        pair.difference <= TOLERANCE for pair in losses
    ):
        raise ValueError(f"the two sides do not train alike: {losses}")
    return losses


def arguments_of(load: Workload, way: Way, documents: Path, *, steps: int) -> dict[str, Any]:
    """What the worker of a way is told to train."""
    common = {"documents": str(documents), "precision": way.precision, "steps": steps, "at_once": way.at_once}
    if way.runtime == UPSTREAM:
        own: dict[str, Any] = {"documents_per_step": load.documents_per_step}
        return common | own | {"is_flattened": way.is_flattened}
    own = {"sequences_per_step": load.sequences_per_step, "sequence_length": load.sequence_length}
    return common | own


def summarize(load: Workload, rounds: Sequence[Round], largest: Round) -> tuple[list[Row], list[Comparison]]:
    """Rows of all ways, and comparisons of ours with upstream's.

    Args:
        load: whose ways were measured.
        rounds: whose times and memory count; ratios are taken within each.
        largest: the one of the largest batches, whose memory counts.
    """
    answers = {way: [each.answers[i] for each in rounds] for i, way in enumerate(load.ways)}
    extreme: dict[Way, int] = {
        way: answer["growth_bytes"] for way, answer in zip(load.ways, largest.answers, strict=True)
    }
    rows = [_row(load, way, each, extreme[way]) for way, each in answers.items()]
    comparisons = [
        Comparison(
            precision=ours.precision,
            way=ours.name,
            peer_way=upstream.name,
            tokens_at_once=load.tokens_at_once(ours),
            peer_tokens_at_once=load.tokens_at_once(upstream),
            peer_at_once=upstream.at_once,
            speed=_ratio(answers[ours], answers[upstream], _rate),
            memory=_ratio(answers[ours], answers[upstream], lambda answer: answer["growth_bytes"]),
            largest_memory=extreme[ours] / extreme[upstream],
        )
        for ours, upstream in pairs(load.ways)
    ]
    return rows, comparisons


def _worker(way: Way, threads: int) -> Worker:
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return Worker([sys.executable, "-m", _MODULES[way.runtime]], environment=environment)


def _length_groups(load: Workload, workers: Mapping[Way, Worker], lengths: list[int]) -> list[int]:
    grouped = next(way for way in load.ways if way.order == GROUPED)
    asked = {"lengths": lengths, "documents_per_step": load.documents_per_step}
    order: list[int] = workers[grouped].ask("length_groups", **asked)["order"]
    return order


def _extreme(files: Mapping[Way, Files]) -> dict[Way, Path]:
    return {way: each.extreme for way, each in files.items()}


def _rounds(
    load: Workload, workers: Mapping[Way, Worker], files: Mapping[Way, Files], *, rounds: int, report: Report
) -> list[Round]:
    paths = {way: each.typical for way, each in files.items()}
    done: list[Round] = []
    while sum(each.is_quiet for each in done) < rounds and len(done) < MOST_REPEATS * rounds:
        done.append(_round(load, workers, paths, steps=load.steps))
        rates = ", ".join(f"{_rate(answer):,.0f}" for answer in done[-1].answers)
        report(f"round {len(done)}, {done[-1].seconds:.0f} s: {rates} useful tokens/s")
    return quietest(done, rounds)


def _round(load: Workload, workers: Mapping[Way, Worker], paths: Mapping[Way, Path], *, steps: int) -> Round:
    start = time.monotonic()
    meter = ContentionMeter([each.process.pid for each in workers.values()])
    answers = []
    for way in load.ways:
        time.sleep(_SETTLE_SECONDS)
        answers.append(workers[way].ask("train", **arguments_of(load, way, paths[way], steps=steps)))
    return Round(answers, meter.share(), time.monotonic() - start)


def _row(load: Workload, way: Way, answers: Sequence[Mapping[str, Any]], largest: int) -> Row:
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
        largest_growth_bytes=largest,
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
