"""A whole run of the experiments, from models to `Study`: everything that is published, as one object.

It decides what is loaded when: the shipped network of a size and format stays, one changed network at a time
is loaded beside it.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.engine_peer import random_prompts
from benchmarks.experiments.block_quality import (
    CANDIDATES,
    BlockQuality,
    bundled_model,
    mean_loss,
    quality_of,
)
from benchmarks.experiments.catalogue import EXPERIMENTS, FORMATS, SHIPPED, Experiment, processors
from benchmarks.experiments.graphs import Shipped, build
from benchmarks.experiments.measure import Pair, Plan, Ratio, Side, Timeable, compare
from benchmarks.experiments.models import Model
from benchmarks.experiments.network import CONTEXT, Network, PackageNetwork, Settings
from benchmarks.experiments.outside import Outside, outside_network
from benchmarks.experiments.profile import Profile, profile
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.quality import held_out_windows, shared_folder
from benchmarks.results import Setting
from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.quantization import QuantizationScheme

FORMAT = 1
_PROMPT_TOKENS = 128
# Of the held-out books: every sixth window, or in a quick run every fiftieth.
_WINDOW_STRIDE = 6
_QUICK_STRIDE = 50
_SMALL_SIZES = ("17m", "32m")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """One experiment at one size and format; times in seconds, medians of the rounds.

    Attributes:
        logit_difference: of the prompt's last logits, max abs difference / max abs value; None where the
            graph puts out no logits.
        failure: why it could not be run; the numbers are None then.
    """

    experiment: str
    size: str
    format: str
    decode: Ratio | None
    prefill: Ratio | None
    shipped_step_seconds: float | None
    shipped_prefill_seconds: float | None
    logit_difference: float | None
    rounds: int
    others_share: float | None
    failure: str | None


@dataclass(frozen=True)
class Study(Setting):
    """One run: outcomes, profiles, what lies outside the network, perplexities, notes."""

    prompt_tokens: int
    outcomes: list[Outcome]
    profiles: list[Profile]
    outside: list[Outside]
    qualities: list[BlockQuality]
    notes: list[str]


@dataclass(frozen=True)
class Request:
    """What to measure."""

    sizes: tuple[str, ...]
    threads: int
    rounds: int
    experiments: tuple[Experiment, ...] = EXPERIMENTS
    is_quick: bool = False


def run(request: Request, report: Report) -> Study:
    """Everything that was asked for."""
    outcomes: list[Outcome] = []
    profiles: list[Profile] = []
    prompt = tuple(random_prompts(_PROMPT_TOKENS, 1)[0])
    for size in request.sizes:
        model = Model.random(released_architecture(size), num_positions=CONTEXT, threads=request.threads)
        for fmt in FORMATS:
            chosen = [each for each in request.experiments if fmt in each.formats and _fits(each, size)]
            if chosen:
                outcomes += measure_format(size, fmt, chosen, model, request, prompt, report)
        for fmt in ("int8", "int4"):
            report(f"{size} {fmt}: profile")
            profiles += profile(size, fmt, model, threads=request.threads, prompt=prompt)
    outside = []
    for size in request.sizes:
        report(f"{size}: outside the network")
        outside += outside_network(size, threads=request.threads, prompt=_PROMPT_TOKENS)
    qualities, notes = block_qualities(request, report)
    return Study(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=request.threads,
        versions=harness_versions(),
        prompt_tokens=_PROMPT_TOKENS,
        outcomes=outcomes,
        profiles=profiles,
        outside=outside,
        qualities=qualities,
        notes=notes,
    )


def measure_format(
    size: str,
    fmt: str,
    experiments: Iterable[Experiment],
    model: Model,
    request: Request,
    prompt: tuple[int, ...],
    report: Report,
) -> list[Outcome]:
    """The experiments of one size and format, each beside the shipped network."""
    scheme = QuantizationScheme.named(*FORMATS[fmt])
    outcomes = []
    for experiment in experiments:
        report(f"{size} {fmt}: {experiment.name}")
        outcomes.append(measure_experiment(experiment, model, scheme, request, prompt, size=size, fmt=fmt))
    return outcomes


def plan_for(
    size: str, experiment: Experiment, request: Request, prompt: tuple[int, ...]
) -> tuple[int, Plan]:
    """How often both networks are loaded, and the plan of each time.

    Two networks of the same kind differ by some per cent, by where their memory lies: hence several loads.
    Large ones differ less, and take longer.
    """
    is_small = size in _SMALL_SIZES
    rounds = request.rounds if is_small else max(1, 2 * request.rounds // 3)
    loads = min(rounds, 3 if is_small else 2)
    plan = Plan(
        rounds // loads,
        turns=6 if is_small else 2,
        steps=10 if is_small else 8,
        prompt=prompt,
        settle_seconds=experiment.settle_seconds,
    )
    return loads, plan


def measure_experiment(
    experiment: Experiment,
    model: Model,
    scheme: QuantizationScheme,
    request: Request,
    prompt: tuple[int, ...],
    *,
    size: str,
    fmt: str,
) -> Outcome:
    """One experiment against the shipped network; one that the runtime refuses is an outcome too."""
    loads, plan = plan_for(size, experiment, request, prompt)
    reference = replace(SHIPPED, reader=experiment.shipped_reader, shipped_reader=experiment.shipped_reader)
    pinned = frozenset(processors()[:1]) if experiment.pins_caller else None
    settings = Settings(request.threads)
    pairs: list[Pair] = []
    difference = None
    for i in range(loads):
        chosen = (reference, experiment) if i % 2 == 0 else (experiment, reference)
        try:
            loaded = {each.name: _network(each, model, scheme, settings) for each in chosen}
            shipped, changed = loaded[SHIPPED.name], loaded[experiment.name]
            found = compare(Side(shipped), Side(changed, pinned), plan)
        except Exception as error:  # every kind of failure of the runtime has a class of its own
            return Outcome(experiment.name, size, fmt, *[None] * 5, 0, None, failure=_first_line(error))
        if i == 0:
            difference = relative_difference(changed, shipped, prompt)
        for network in loaded.values():
            network.close()
        pairs += found
        if len(found) < plan.rounds:
            break
    return outcome_of(experiment.name, size, fmt, pairs, difference)


def outcome_of(name: str, size: str, fmt: str, pairs: Sequence[Pair], difference: float | None) -> Outcome:
    """Ratios and medians of the rounds."""
    shipped, changed = [each.shipped for each in pairs], [each.changed for each in pairs]
    shares = [each.others_share for each in pairs if each.others_share is not None]
    return Outcome(
        experiment=name,
        size=size,
        format=fmt,
        decode=Ratio.of([t.step_seconds for t in shipped], [t.step_seconds for t in changed]),
        prefill=Ratio.of([t.prefill_seconds for t in shipped], [t.prefill_seconds for t in changed]),
        shipped_step_seconds=statistics.median(t.step_seconds for t in shipped),
        shipped_prefill_seconds=statistics.median(t.prefill_seconds for t in shipped),
        logit_difference=difference,
        rounds=len(pairs),
        others_share=statistics.median(shares) if shares else None,
        failure=None,
    )


def block_qualities(request: Request, report: Report) -> tuple[list[BlockQuality], list[str]]:
    """Perplexities by block size, or a note on why there are none."""
    shared = shared_folder()
    if shared is None:
        return [], ["Perplexities were not measured: the held-out books are not here (set MBD_SHARED)."]
    windows = held_out_windows(shared)[0][:: _QUICK_STRIDE if request.is_quick else _WINDOW_STRIDE]
    model = bundled_model(threads=request.threads)
    losses = []
    for candidate in CANDIDATES:
        report(f"perplexity: {candidate.name}")
        losses.append(mean_loss(candidate, model, windows, threads=request.threads))
    qualities = [quality_of(each, loss, losses[0]) for each, loss in zip(CANDIDATES, losses, strict=True)]
    return qualities, []


def relative_difference(changed: Timeable, shipped: Timeable, prompt: tuple[int, ...]) -> float | None:
    """Of the prompt's last logits: largest absolute difference over the largest absolute value."""
    found = []
    for network in (changed, shipped):
        network.prefill(prompt)
        if not isinstance(network, Network) or "logits" not in network.outputs(len(prompt)):
            return None
        found.append(network.outputs(len(prompt))["logits"])
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max())


def _built(kind: type[Shipped], model: Model, scheme: QuantizationScheme) -> tuple[bytes, dict[str, Any]]:
    graph, weights = build(
        kind, model.architecture, scheme, model.weights(scheme), model.tensor, num_positions=CONTEXT
    )
    return graph, dict(weights)


def _network(
    experiment: Experiment, model: Model, shipped_scheme: QuantizationScheme, settings: Settings
) -> Network | PackageNetwork:
    graph, weights = _built(experiment.graph, model, experiment.scheme(shipped_scheme))
    if experiment.is_package:
        runtime = Runtime(
            model.architecture,
            graph,
            weights,
            num_slots=1,
            context_length=CONTEXT,
            threads=settings.threads,
            providers=("CPUExecutionProvider",),
        )
        return PackageNetwork(runtime)
    changed = replace(settings, **experiment.settings)
    return Network(model.architecture, graph, weights, changed, reader=experiment.reader)


def _fits(experiment: Experiment, size: str) -> bool:
    """Blocks that no matrix of a size can be cut into would measure what is shipped."""
    body = experiment.body_block
    architecture = released_architecture(size)
    columns = (architecture.hidden_size, architecture.intermediate_size)
    return body is None or any(each % body == 0 for each in columns)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
