"""The page of a run under load, made from its results alone, and whether they are all that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers import Absent
from benchmarks.results import Setting
from benchmarks.serving.load import LoadResult, Workload
from benchmarks.serving.servers import LLAMA, OURS, Setup
from benchmarks.summary import Spread
from benchmarks.tables import number, setting, spread_text, table

FORMAT = 3
SIZES = ("17m", "150m")
CLIENTS = (1, 8, 32)
# Of a run that may be published as a whole: measurements of each server, and how long each of them is.
FULL_ROUNDS, FULL_SECONDS = 3, 20.0
# At this many clients, at least this many times the tokens per second of llama-server.
TARGET_CLIENTS, TARGET_RATIO = 8, 2.0
_SETTING = (
    "Random models of the released shapes: ours as ModernBERT decoders, llama.cpp's as Llamas of the "
    "same layers, widths and vocabulary, with the same tokens. Every client asks for one streamed "
    "completion after the other, on new connections; prompts have 8 to 256 words and completions 16 to "
    "128 tokens, drawn alike for every server and new in every round. The servers of a group are all "
    "loaded, and rounds alternate between them, so that each has the machine to itself while it is "
    "measured. Clients run on the same processors. `llama-server` has 8 parallel slots, ours 32. Tokens "
    "per second are those of all completions together; times are medians over the rounds of the "
    "percentiles over all requests. Time between tokens is that between chunks with text. "
    "`int8+w8a8` decodes in int8 and reads prompts with integer products per row, which takes memory for the "
    "model twice; `int4+w8a8` likewise, so that it reads prompts in 8 bits, where llama-server's have 4. "
    "What is not batch-invariant lets answers depend a little on neighbours, as llama-server's do."
)


@dataclass(frozen=True)
class Group:
    """Setups that are compared with each other."""

    name: str
    setups: Sequence[Setup]
    workload: Workload
    clients: Sequence[int]


@dataclass(frozen=True)
class Line:
    """One server under one number of clients, over the rounds; times in seconds.

    Attributes:
        rates: tokens per second of each round.
        ratio: the first server's tokens per second over this one's, within each round; None for the first.
        errors: requests that failed.
        rss_growth: resident bytes at the end of the last round over those at its beginning, so that what the
            first ones made the server keep does not count; None if they were not watched.
    """

    group: str
    server: str
    variant: str
    size: str
    clients: int
    rounds: int
    rates: list[float]
    tokens_per_second: Spread
    ratio: Spread | None
    first_token_p50: Spread
    first_token_p95: Spread
    between_p50: Spread
    between_p95: Spread
    requests: int
    errors: int
    rss_growth: float | None

    @classmethod
    def of(
        cls,
        group: str,
        setup: Setup,
        clients: int,
        results: Sequence[LoadResult],
        of_first: Sequence[LoadResult],
        *,
        is_first: bool,
    ) -> Line:
        """Of all rounds, in the order in which they were measured."""
        rss = results[-1].rss
        rates = [each.tokens_per_second for each in results]
        ratios = _ratios([each.tokens_per_second for each in of_first], rates)
        return cls(
            group=group,
            server=setup.server,
            variant=setup.variant,
            size=setup.size,
            clients=clients,
            rounds=len(results),
            rates=rates,
            tokens_per_second=Spread.of(rates),
            ratio=None if is_first or not ratios else Spread.of(ratios),
            first_token_p50=Spread.of(each.first_token[0] for each in results),
            first_token_p95=Spread.of(each.first_token[1] for each in results),
            between_p50=Spread.of(each.between[0] for each in results),
            between_p95=Spread.of(each.between[1] for each in results),
            requests=sum(each.requests for each in results),
            errors=sum(sum(each.errors.values()) for each in results),
            rss_growth=rss[-1] / rss[0] if len(rss) > 1 and rss[0] else None,
        )


def _ratios(rates: Sequence[float], others: Sequence[float]) -> list[float]:
    return [rate / other for rate, other in zip(rates, others, strict=True) if other]


@dataclass(frozen=True)
class ServingResults(Setting):
    """One run.

    Attributes:
        rounds: measurements of each server under each number of clients.
        seconds: that each of them took.
    """

    is_quick: bool
    rounds: int
    seconds: float
    absent: list[Absent]
    lines: list[Line]


def missing(results: ServingResults) -> list[str]:
    """What a run lacks of a whole one, in words; nothing if it is one."""
    found: list[str] = []
    for server in (OURS, LLAMA):
        measured = {(line.size, line.clients) for line in results.lines if line.server == server}
        absent = [
            f"{size} with {clients} client{'s' if clients > 1 else ''}"
            for size in SIZES
            for clients in CLIENTS
            if (size, clients) not in measured
        ]
        if absent:
            found.append(f"{server} at {', '.join(absent)}")
    if results.rounds < FULL_ROUNDS:
        found.append(f"{FULL_ROUNDS} rounds ({results.rounds} were measured)")
    if results.seconds < FULL_SECONDS:
        found.append(f"{FULL_SECONDS:g} seconds for each ({results.seconds:g} were taken)")
    return found


def is_complete(results: ServingResults) -> bool:
    """Whether both servers were loaded at every size by every number of clients, at full length."""
    return not results.is_quick and not missing(results)


def page(results: ServingResults) -> str:
    """docs/serving-benchmarks.md."""
    lacking = missing(results)
    parts = [
        "# Serving under load",
        "Written by `make bench-serving` (`python -m benchmarks.serving`) from one run.",
        setting(results),
        f"{_SETTING} Each row is of {results.rounds} rounds of {results.seconds:g} seconds.",
        *(
            [f"**A partial run**, whose rows are indications. A whole one has: {'; '.join(lacking)}."]
            if lacking
            else []
        ),
        "## Numbers to hold",
        _claims(results.lines),
    ]
    for name in dict.fromkeys(line.group for line in results.lines):
        parts += [f"## {name}", _table(line for line in results.lines if line.group == name)]
    if results.absent:
        parts += ["## Not measured", "\n".join(f"- {each}" for each in results.absent)]
    return "\n\n".join(parts) + "\n"


def _claims(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        if line.server != LLAMA or line.clients != TARGET_CLIENTS:
            continue
        for own in lines:
            if (own.group, own.clients, own.server) != (line.group, line.clients, OURS):
                continue
            ratios = _ratios(own.rates, line.rates)
            if not ratios:
                continue
            ratio = Spread.of(ratios)
            is_prompt = (
                own.first_token_p50.median <= line.first_token_p50.median
                and own.first_token_p95.median <= line.first_token_p95.median
            )
            rows.append(
                [
                    f"{own.size}, {own.variant} and {line.variant}, {line.clients} clients",
                    f"{TARGET_RATIO:g}x tokens/s",
                    spread_text(ratio),
                    "held" if ratio.median >= TARGET_RATIO else "**not held**",
                    "first token, p50 and p95, no worse",
                    "held" if is_prompt else "**not held**",
                ]
            )
    if not rows:
        return "llama-server was not measured at 8 clients."
    return table(["against llama-server", "target", "measured", "", "target", ""], rows)


def _table(lines: Iterable[Line]) -> str:
    header = [
        "server",
        "clients",
        "tokens/s",
        "first over this",
        "first token p50, ms",
        "p95",
        "between tokens p50, ms",
        "p95",
        "requests",
        "failed",
        "memory in the last round, end / begin",
    ]
    rows = [
        [
            f"{line.server} {line.variant}",
            str(line.clients),
            spread_text(line.tokens_per_second),
            spread_text(line.ratio) if line.ratio else "",
            number(line.first_token_p50.median * 1e3),
            number(line.first_token_p95.median * 1e3),
            number(line.between_p50.median * 1e3),
            number(line.between_p95.median * 1e3),
            str(line.requests),
            str(line.errors),
            "" if line.rss_growth is None else f"{line.rss_growth:.2f}",
        ]
        for line in lines
    ]
    return table(header, rows)
