"""Everything but the network in a decode step: scheduling, sampling, log-probabilities, detokenization.

Measured at 17m int8, where the network is fastest and the rest weighs most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import Installed, start_worker
from benchmarks.summary import Spread

OVERHEAD_SIZE = "17m"
OVERHEAD_VARIANT = "int8"
SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-k 64, 5 log-probabilities": {"temperature": 1.0, "top_k": 64, "logprobs": 5, "seed": 1},
    "unrestricted sampling": {"temperature": 1.0, "seed": 1},
}
_PROMPT_TOKENS = 128
_TOKENS = 128


@dataclass(frozen=True)
class Overhead:
    """The share of a step's wall time that is not spent inside the network."""

    sampling: str
    share: Spread
    rest_seconds: Spread


def share_outside(step_seconds: list[float], network_seconds: list[float]) -> float:
    """The share of the summed step time that is not network time.

    >>> share_outside([1.0, 1.0], [0.75, 0.75])
    0.25
    """
    return 1 - sum(network_seconds) / sum(step_seconds)


def overhead_table(
    engine: Installed, *, threads: int, rounds: int, report: Callable[[str], None]
) -> list[Overhead]:
    """One line per way of sampling, rounds interleaved."""
    report(f"{OVERHEAD_SIZE} {OVERHEAD_VARIANT}: everything but the network in a decode step")
    shares: dict[str, list[float]] = {name: [] for name in SAMPLING}
    rests: dict[str, list[float]] = {name: [] for name in SAMPLING}
    worker, _ = start_worker(engine, OVERHEAD_VARIANT, OVERHEAD_SIZE, threads=threads)
    with worker:
        for i in range(rounds + 1):
            for name, sampling in SAMPLING.items():
                answer = worker.ask(
                    "overhead", prompt=_PROMPT_TOKENS, tokens=_TOKENS, sampling=dict(sampling)
                )
                if i == 0:  # warm-up
                    continue
                steps, network = answer["step_seconds"], answer["network_seconds"]
                shares[name].append(share_outside(steps, network))
                rests[name].append((sum(steps) - sum(network)) / len(steps))
    return [Overhead(name, Spread.of(shares[name]), Spread.of(rests[name])) for name in SAMPLING]
