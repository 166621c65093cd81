"""What a decode step of the package spends outside the network, part by part.

The parts are timed by wrapping the methods that do them, for the time of the measurement; a wrapper costs a
third of a microsecond.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.engine_peer import EnginePeer, random_prompts
from benchmarks.peers import model_folder
from benchmarks.step_overhead import SAMPLING
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.sampling import RequestSampler

_TOKENS = 128
_VARIANT = "int8"


@dataclass(frozen=True)
class Outside:
    """Median seconds per step of one way of sampling.

    Attributes:
        network: inside ONNX Runtime.
        feeding: writing inputs and the rest of the runtime's step.
        sampling: from the logits to the token.
        text: detokenization, stop strings, bookkeeping of the request.
        scheduling: the rest of the step.
    """

    size: str
    what: str
    step: float
    network: float
    feeding: float
    sampling: float
    text: float
    scheduling: float


def outside_network(size: str, *, threads: int, prompt: int) -> list[Outside]:
    """One entry for every way of sampling that the benchmarks measure."""
    peer = EnginePeer()
    peer.load(model=str(model_folder(size)), variant=_VARIANT, threads=threads)
    with peer.llm:
        for sampling in SAMPLING.values():  # warm-up
            breakdown(peer, sampling, prompt=prompt, tokens=_TOKENS // 4)
        return [
            Outside(size, what, **breakdown(peer, sampling, prompt=prompt, tokens=_TOKENS))
            for what, sampling in SAMPLING.items()
        ]


def breakdown(peer: EnginePeer, sampling: Mapping[str, Any], *, prompt: int, tokens: int) -> dict[str, float]:
    """Median seconds of the parts of a step, by the names of `Outside`."""
    methods = {
        "runtime": (Runtime, "step"),
        "sampling": (RequestSampler, "sample"),
        "text": (Request, "accept"),
    }
    watched: dict[str, list[float]] = {name: [] for name in methods}
    with ExitStack() as stack:
        for name, (owner, method) in methods.items():
            stack.enter_context(watching(owner, method, watched[name]))
        steps, network = peer._step_seconds(random_prompts(prompt, 1), sampling, tokens)
    # The first calls belong to the prefill.
    runtime, sampled, accepted = (watched[name][-tokens:] for name in methods)
    return {
        "step": statistics.median(steps),
        "network": statistics.median(network),
        "feeding": _median_rest(runtime, network),
        "sampling": statistics.median(sampled),
        "text": _median_rest(accepted, sampled),
        "scheduling": statistics.median(
            step - one - two for step, one, two in zip(steps, runtime, accepted, strict=True)
        ),
    }


@contextmanager
def watching(owner: type, method: str, seconds: list[float]) -> Iterator[None]:
    """Appends to `seconds` what every call of the method takes."""
    original = getattr(owner, method)

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments, **named)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, original)


def _median_rest(whole: Sequence[float], part: Sequence[float]) -> float:
    return statistics.median(a - b for a, b in zip(whole, part, strict=True))
