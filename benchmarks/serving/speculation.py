"""`python -m benchmarks.serving.speculation`: tokens per second with and without drafts.

One sequence, two engines in one process, measured in turn. Cases in which drafts are right, in which they are
wrong, and in which they are wrong and made nevertheless. A run of all cases writes the file
benchmarks/results/<date>-<cpu>-speculation.json and docs/speculation-benchmarks.md; partial ones write JSON
and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import CACHE
from benchmarks.protocol import PROMPT_ID_LIMIT
from benchmarks.publishing import Publication
from benchmarks.random_models import ensure_checkpoint
from benchmarks.results import Setting
from benchmarks.serving.pairs import Pair, add_options, measure_pair, save, use_engine_cache
from benchmarks.session import report
from benchmarks.tables import number, setting, spread_text, table
from modernbert_decoder import LLM, SamplingParams
from modernbert_decoder.engine.speculation import Speculation

STORYTELLER = "storyteller"
FORMAT = 2
FULL_ROUNDS = 15
_TOKENS = 256
# In a round: a completion of the bundled model takes a tenth of a second or less, too little to time.
_COMPLETIONS = {STORYTELLER: 10}
_PROMPT_TOKENS = 64
_LIST = "The ship carried apples, pears and plums. The ship carried apples, pears and plums. The ship carried"
_STORY = "Once upon a time there was a little girl who lived by the sea. "
_GREEDY: dict[str, Any] = {"temperature": 0}
_SAMPLED: dict[str, Any] = {"temperature": 1.0}


@dataclass(frozen=True)
class Case:
    """What is generated, and how it is drafted.

    Attributes:
        name: as the table says it.
        model: "storyteller" or the size of a random model.
        prompt: text; None for random tokens.
        sampling: parameters; a seed is added for each round.
        draft_size: of a random draft model; None drafts by prompt lookup.
        adaptive: as in `Speculation`.
        is_invariant: whether both engines are batch-invariant, as in the server, so that texts are equal.
    """

    name: str
    model: str
    prompt: str | None
    sampling: dict[str, Any]
    draft_size: str | None = None
    adaptive: bool = True
    is_invariant: bool = False


CASES = (
    Case("prompt lookup, a text that repeats itself", STORYTELLER, _LIST, _GREEDY),
    Case("the same, batch-invariant", STORYTELLER, _LIST, _GREEDY, is_invariant=True),
    Case("prompt lookup, a random model's greedy loop", "150m", None, _GREEDY),
    Case("prompt lookup, a story that does not repeat itself", STORYTELLER, _STORY, _SAMPLED),
    Case("the same story, batch-invariant", STORYTELLER, _STORY, _SAMPLED, is_invariant=True),
    Case("prompt lookup, noise", "150m", None, _SAMPLED),
    Case("17m drafts for 150m and is never right", "150m", None, _SAMPLED, "17m"),
    Case("the same, drafting nevertheless", "150m", None, _SAMPLED, "17m", adaptive=False),
    Case("150m drafts for itself and is nearly always right", "150m", None, _GREEDY, "150m"),
    Case("the same pair, batch-invariant", "150m", None, _GREEDY, "150m", is_invariant=True),
)


@dataclass(frozen=True)
class SpeculationRow:
    """Tokens per second without drafts (`rates.first`) and with them.

    Attributes:
        rates: the rates of decoding, and those with drafts over those without.
        num_tokens: per round.
        num_drafted: in all rounds.
        num_accepted: of these.
    """

    case: str
    model: str
    dtype: str
    rates: Pair
    num_tokens: int
    num_drafted: int
    num_accepted: int


def measure(case: Case, dtype: str, *, threads: int, rounds: int, folder: Path) -> SpeculationRow:
    """One row."""
    model = case.model if case.model == STORYTELLER else str(ensure_checkpoint(case.model, folder))
    draft = None if case.draft_size is None else ensure_checkpoint(case.draft_size, folder)
    speculation = Speculation(
        draft_model=draft, dtype=None if draft is None else dtype, adaptive=case.adaptive
    )
    options: dict[str, Any] = {"dtype": dtype, "threads": threads, "batch_invariant": case.is_invariant}
    with (
        LLM(model, **options) as plain,
        LLM(model, speculation=speculation, **options) as drafting,
    ):
        rates = measure_pair(_rate(plain, case), _rate(drafting, case), rounds=rounds)
        speculator = drafting._driver.scheduler.speculator
        assert speculator is not None
        return SpeculationRow(
            case=case.name,
            model=case.model,
            dtype=dtype,
            rates=rates,
            num_tokens=_TOKENS * _num_completions(case),
            num_drafted=speculator.num_drafted,
            num_accepted=speculator.num_accepted,
        )


def _num_completions(case: Case) -> int:
    return _COMPLETIONS.get(case.model, 1)


def _rate(llm: LLM, case: Case) -> Callable[[int], float]:
    """Measures the tokens per second of decoding in one round."""

    def seconds(number: int) -> float:
        """Of a completion, per token."""
        prompt: Any = case.prompt
        if prompt is None:
            ids = np.random.default_rng(number).integers(0, PROMPT_ID_LIMIT, _PROMPT_TOKENS)
            prompt = [int(each) for each in ids]
        params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True, seed=number, **case.sampling)
        return 1 / llm.generate([prompt], params)[0].timings.decode_tokens_per_second

    def rate(number: int) -> float:
        count = _num_completions(case)
        return count / sum(seconds(number * count + i) for i in range(count))

    return rate


@dataclass(frozen=True)
class SpeculationResults(Setting):
    """One run."""

    rows: list[SpeculationRow]


_SETTING = (
    f"One sequence of {_TOKENS} tokens at a time; in each round one, or {_COMPLETIONS[STORYTELLER]} in turn "
    "where the model is storyteller. That is the bundled model, the others are random ones of the "
    "released shapes, which follow nothing: sampled, their text is noise, and greedy, it soon goes round in "
    "circles. Two engines of one process decode in turn, with and without drafts; ratios are taken within "
    "each round, and the table has medians, in parentheses the least and the greatest."
)


def page(results: SpeculationResults) -> str:
    """docs/speculation-benchmarks.md."""
    partial = "" if is_complete(results) else "**A partial run**: its rows are indications."
    parts = [
        "# Speculation",
        "Written by `python -m benchmarks.serving.speculation` from one run.",
        setting(results),
        _SETTING,
        partial,
        _table(results.rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[SpeculationRow]) -> str:
    header = [
        "case",
        "model",
        "rounds",
        "drafts accepted",
        "without, tokens/s",
        "with, tokens/s",
        "with / without",
    ]
    cells = [
        [
            row.case,
            f"{row.model} {row.dtype}",
            str(row.rates.rounds),
            f"{row.num_accepted:,} of {row.num_drafted:,}",
            number(row.rates.first.median),
            number(row.rates.second.median),
            spread_text(row.rates.ratio),
        ]
        for row in rows
    ]
    return table(header, cells)


def is_complete(results: SpeculationResults) -> bool:
    """Whether every case was measured, often enough."""
    is_whole = {row.case for row in results.rows} == {case.name for case in CASES}
    return is_whole and all(row.rates.rounds >= FULL_ROUNDS for row in results.rows)


PUBLICATION = Publication(
    SpeculationResults, FORMAT, "speculation", "speculation-benchmarks.md", page, is_complete
)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.speculation")
    parser.add_argument("--cases", nargs="+", type=int, metavar="NUMBER", default=range(len(CASES)))
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    add_options(parser, rounds=FULL_ROUNDS)
    options = parser.parse_args(arguments)
    if options.render:
        return PUBLICATION.render(options.render)
    use_engine_cache()
    rows = []
    for case in map(CASES.__getitem__, options.cases):
        report(case.name)
        rows.append(
            measure(
                case,
                options.dtype,
                threads=options.threads,
                rounds=options.rounds,
                folder=CACHE,
            )
        )
    save(rows, options.json)
    return PUBLICATION.store(
        SpeculationResults(
            format=FORMAT,
            date=datetime.date.today().isoformat(),
            machine=describe_machine(),
            threads=options.threads,
            versions=harness_versions(),
            rows=rows,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
