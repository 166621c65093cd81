"""docs/experiments.md, from a `Study` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.experiments.catalogue import CONTROLS, EXPERIMENTS, Experiment
from benchmarks.experiments.measure import NOTEWORTHY, Ratio
from benchmarks.experiments.study import Outcome, Study
from benchmarks.summary import MEASURES
from benchmarks.tables import number, setting, table

Model = tuple[str, str]  # size, format
Noise = Mapping[Model, Mapping[str, float]]

_CONTROLS = frozenset(each.name for each in CONTROLS)

_VERDICTS = {"faster": "**faster**", "slower": "slower", "no difference": "same"}

_METHOD = """\
What was tried to make the network faster, written by `python -m benchmarks.experiments` from one run. Every
experiment changes one thing of the shipped configuration, on random weights of the released shapes, one
sequence, a prompt of PROMPT tokens. Both networks are loaded in one process, afresh several times, and
asked in turn (A B, B A) every few steps; a round gives the median time of a prefill and of a decode step of
each, reading the best token included.

**A ratio is the shipped time over the changed time in the same round: above 1, the change is faster.** The
tables give the median of the rounds, and the quartiles in brackets. A ratio is called faster or slower where
three quarters of the rounds agree, it is off by at least LEAST, and by more than the shipped configuration
was from itself in any of the controls. `int4` is the pure format, its vocabulary in 4 bits as well. *Logits*
is the largest difference of the prompt's last logits over the largest logit, on random weights: 0 is the same
computation, 1e-2 is another rounding of the activations."""

_PROFILE_LEGEND = """\
From ONNX Runtime's profiler. Nodes are grouped by what they compute; a product is named after its weight. The
profiler itself makes calls slower, most where nodes are short."""

_OUTSIDE_LEGEND = """\
A decode step of the package, int8, one sequence, in microseconds (medians): *feeding* writes the inputs,
*text* is detokenization, stop strings and bookkeeping."""

_QUALITY_LEGEND = """\
The bundled model on the held-out books. It is 256 wide; its feed-forward output, 384 columns, cannot be cut
into blocks of 256 and falls back to 128. *Whole blocks* pad every row, which the package does not do, to show
what longer blocks cost. The vocabulary is in 8 bits where nothing is said.
Every sixth window of the books is read, so that the figures differ a little from docs/benchmarks.md, which
reads all."""


def full_page(study: Study) -> str:
    """The page."""
    noise = noise_of(study.outcomes)
    groups = dict.fromkeys(each.group for each in EXPERIMENTS)
    sections = [
        "# Experiments",
        _METHOD.replace("PROMPT", str(study.prompt_tokens)).replace("LEAST", f"{NOTEWORTHY:.0%}"),
        setting(study),
        _others(study),
        *study.notes,
        "## Findings",
        _findings(study.outcomes, noise),
    ]
    for group in groups:
        sections += [f"## {group}", *_group(group, study.outcomes, noise)]
    sections += _profiles(study)
    sections += _outside(study)
    sections += _qualities(study)
    return "\n\n".join(section for section in sections if section) + "\n"


def _others(study: Study) -> str:
    shares = [each.others_share for each in study.outcomes if each.others_share is not None]
    return f"Other programs took at most {max(shares):.1%} of the processors (medians)." if shares else ""


def noise_of(outcomes: Iterable[Outcome]) -> dict[Model, dict[str, float]]:
    """How far the controls, which change nothing, were from 1, by size and format and by measure."""
    noise: dict[Model, dict[str, float]] = {}
    for each in outcomes:
        found = noise.setdefault((each.size, each.format), dict.fromkeys(MEASURES, 0.0))
        if each.experiment in _CONTROLS:
            for measure, ratio in _ratios(each).items():
                found[measure] = max(found[measure], abs(ratio.median - 1))
    return noise


def _ratios(outcome: Outcome) -> dict[str, Ratio]:
    pairs = {"decode": outcome.decode, "prefill": outcome.prefill}
    return {measure: ratio for measure, ratio in pairs.items() if ratio is not None}


def _verdicts(outcome: Outcome, noise: Noise) -> set[str]:
    known = noise[outcome.size, outcome.format]
    return {ratio.verdict(known[measure]) for measure, ratio in _ratios(outcome).items()}


def _findings(outcomes: Sequence[Outcome], noise: Noise) -> str:
    """Where a change was faster somewhere, and what it was elsewhere."""
    names = [
        each.experiment
        for each in outcomes
        if each.experiment not in _CONTROLS
        and "faster"
        in {ratio.verdict(noise[each.size, each.format][m]) for m, ratio in _ratios(each).items()}
    ]
    if not names:
        return "No change was faster anywhere."
    rows = [
        [name, f"{each.size} {each.format}", *_cells(each, noise)]
        for name in dict.fromkeys(names)
        for each in outcomes
        if each.experiment == name and each.failure is None
    ]
    return "Changes that were faster in something, and what they were elsewhere:\n\n" + table(
        ["change", "model", "decode", "", "prefill", ""], rows
    )


def _group(group: str, outcomes: Iterable[Outcome], noise: Noise) -> list[str]:
    """A table of ratios and a list of reasons."""
    experiments = {each.name: each for each in EXPERIMENTS if each.group == group}
    found = [each for each in outcomes if each.experiment in experiments]
    if not found:
        return ["Not measured in this run."]
    header = ["change", "model", "decode", "", "prefill", "", "logits"]
    rows = [_row(each, noise) for each in found]
    measured = dict.fromkeys(each.experiment for each in found)
    return [table(header, rows), "\n".join(_reason(experiments[name]) for name in measured)]


def _reason(experiment: Experiment) -> str:
    return f"- **{experiment.name[0].upper()}{experiment.name[1:]}.** {experiment.why}"


def _row(outcome: Outcome, noise: Noise) -> list[str]:
    model = f"{outcome.size} {outcome.format}"
    if outcome.failure is not None:
        return [outcome.experiment, model, f"refused: {outcome.failure}", "", "", "", ""]
    difference = outcome.logit_difference
    shown = "" if difference is None else "0" if difference == 0 else f"{difference:.0e}"
    return [outcome.experiment, model, *_cells(outcome, noise), shown]


def _cells(outcome: Outcome, noise: Noise) -> list[str]:
    """Ratio and verdict of decode and of prefill; controls, by which others are judged, have no verdict."""
    cells = []
    is_control = outcome.experiment in _CONTROLS
    for measure, ratio in _ratios(outcome).items():
        verdict = ratio.verdict(noise[outcome.size, outcome.format][measure])
        cells += [
            f"{ratio.median:.2f} ({ratio.lower:.2f} to {ratio.upper:.2f})",
            "" if is_control else _VERDICTS[verdict],
        ]
    return cells


def _profiles(study: Study) -> list[str]:
    sections = ["## Node by node", _PROFILE_LEGEND] if study.profiles else []
    for each in study.profiles:
        rows = [
            [
                kind.name,
                str(kind.num_nodes),
                f"{kind.share:.1%}",
                number(kind.seconds * 1e6),
                number(kind.seconds * 1e6 / kind.num_nodes),
            ]
            for kind in each.kinds
        ]
        sections += [
            f"### {each.size} {each.format}, {each.what}: {number(each.seconds * 1e6)} µs",
            table(["nodes", "number", "share", "µs", "µs per node"], rows),
        ]
    return sections


def _outside(study: Study) -> list[str]:
    if not study.outside:
        return []
    rows = []
    for each in study.outside:
        parts = (each.step, each.network, each.feeding, each.sampling, each.text, each.scheduling)
        share = 1 - each.network / each.step
        rows.append([each.size, each.what, *(number(part * 1e6) for part in parts), f"{share:.1%}"])
    header = ["size", "sampling", "step", "network", "feeding", "sampling", "text", "scheduling", "outside"]
    return ["## Outside the network", _OUTSIDE_LEGEND, table(header, rows)]


def _qualities(study: Study) -> list[str]:
    if not study.qualities:
        return []
    rows = [
        [each.name, f"{each.bits_per_weight:.2f}", f"{each.perplexity:.3f}", f"{each.cost:+.2%}"]
        for each in study.qualities
    ]
    header = ["format", "bits per weight in the layers", "perplexity", "against float32"]
    return ["## Block sizes and perplexity", _QUALITY_LEGEND, table(header, rows)]
