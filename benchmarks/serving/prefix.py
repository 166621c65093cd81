"""`python -m benchmarks.serving.prefix`: time to first token with and without the prefix cache.

Prompts of random tokens, of which 512 are the same in all, or none; each is new in every round. Two engines
in one process, measured in turn. Prints a table, and with `--json` the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers import CACHE
from benchmarks.protocol import PROMPT_ID_LIMIT
from benchmarks.random_models import ensure_checkpoint
from benchmarks.serving.pairs import Pair, add_options, measure_pair, save, use_engine_cache
from benchmarks.session import report
from modernbert_decoder import LLM, SamplingParams

SIZES = ("17m", "150m")
SHARED_TOKENS = 512
OWN_TOKENS = 64
# Enough for the shared beginning and the latest prompts: in the long run, something is given up for each.
CACHE_BYTES = {"17m": 32 << 20, "150m": 256 << 20}
_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
# So many prompts until the cache resumes where they part.
_LEARNING_PROMPTS = 3


@dataclass(frozen=True)
class PrefixRow:
    """Seconds to the first token without the cache (`seconds.first`) and with it.

    Attributes:
        num_shared: tokens that all prompts begin with.
        num_own: tokens behind them.
        hit_share: share of the prompts' tokens that were found.
        bytes_held: by the cache at the end.
    """

    size: str
    dtype: str
    num_shared: int
    num_own: int
    seconds: Pair
    hit_share: float
    bytes_held: int


@dataclass
class Prompts:
    """Prompts that share their first tokens, numbered."""

    num_shared: int
    num_own: int
    num_tokens: int = 0

    def seconds_to_first_token(self, llm: LLM, number: int) -> float:
        """From the call to the first token."""
        ids = _ids(self.num_shared, 0) + _ids(self.num_own, 1 + number)
        self.num_tokens += len(ids)
        start = time.perf_counter()
        for _ in llm.stream(ids, _ONE_TOKEN):
            return time.perf_counter() - start
        raise RuntimeError("the stream ended without a token")


def _ids(count: int, seed: int) -> list[int]:
    return [int(each) for each in np.random.default_rng([count, seed]).integers(0, PROMPT_ID_LIMIT, count)]


def measure(size: str, dtype: str, *, threads: int, rounds: int, folder: Path) -> list[PrefixRow]:
    """A row for prompts that share most of their tokens, and one for prompts that share none."""
    model = ensure_checkpoint(size, folder)
    with (
        LLM(model, dtype=dtype, threads=threads) as plain,
        LLM(model, dtype=dtype, threads=threads, prefix_cache_bytes=CACHE_BYTES[size]) as cached,
    ):
        return [
            _measure(size, dtype, plain, cached, num_shared=num_shared, num_own=num_own, rounds=rounds)
            for num_shared, num_own in ((SHARED_TOKENS, OWN_TOKENS), (0, SHARED_TOKENS + OWN_TOKENS))
        ]


def _measure(
    size: str, dtype: str, plain: LLM, cached: LLM, *, num_shared: int, num_own: int, rounds: int
) -> PrefixRow:
    prefix_cache = cached._driver.scheduler.prefix_cache
    assert prefix_cache is not None
    prompts = Prompts(num_shared, num_own)
    for number in range(_LEARNING_PROMPTS):
        prompts.seconds_to_first_token(cached, 1_000_000 + number)
    prompts.num_tokens, hits = 0, prefix_cache.num_hit_tokens
    pair = measure_pair(
        lambda number: prompts.seconds_to_first_token(plain, number),
        lambda number: prompts.seconds_to_first_token(cached, number),
        rounds=rounds,
    )
    return PrefixRow(
        size=size,
        dtype=dtype,
        num_shared=num_shared,
        num_own=num_own,
        seconds=pair,
        hit_share=(prefix_cache.num_hit_tokens - hits) / (prompts.num_tokens / 2),
        bytes_held=prefix_cache.num_bytes,
    )


def table(rows: list[PrefixRow]) -> str:
    """The rows as Markdown."""
    lines = [
        "| size | prompt | tokens found | without, ms | with the cache, ms | with / without |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        one, other, ratio = row.seconds.first, row.seconds.second, row.seconds.ratio
        lines.append(
            f"| {row.size} {row.dtype} | {row.num_shared} shared + {row.num_own} own | {row.hit_share:.0%} "
            f"| {1e3 * one.median:.1f} | {1e3 * other.median:.1f} "
            f"| {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.prefix")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    add_options(parser, rounds=15)
    options = parser.parse_args(arguments)
    use_engine_cache()
    rows: list[PrefixRow] = []
    for size in options.sizes:
        report(f"{size}: time to first token with and without the prefix cache")
        rows += measure(size, options.dtype, threads=options.threads, rounds=options.rounds, folder=CACHE)
    save(rows, options.json)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
