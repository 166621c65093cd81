"""What a server has done, for Prometheus, in a registry of its own.

Request counts and latencies are observed as they happen; what engines know is read when metrics are asked
for. No label has a value that a client chooses freely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from modernbert_decoder.engine.async_llm import AsyncLLM, EngineStats

METRICS_TYPE: Final = CONTENT_TYPE_LATEST  # of what `Metrics.text` gives
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

Read = Callable[[EngineStats], float]
_GAUGES: Final[Sequence[tuple[str, str, Read]]] = (
    ("mbd_requests_running", "Completions that are being computed.", lambda s: s.num_running),
    ("mbd_requests_waiting", "Prompts that wait for a slot.", lambda s: s.num_waiting),
    ("mbd_readings", "Calls that read texts, running or waiting.", lambda s: s.num_reading),
    ("mbd_slots", "Completions that can be computed at a time.", lambda s: s.num_slots),
    ("mbd_kv_used_bytes", "Keys and values of the tokens so far.", lambda s: s.kv_bytes_used),
    ("mbd_kv_reserved_bytes", "What running completions may come to.", lambda s: s.kv_bytes_reserved),
    ("mbd_kv_limit_bytes", "Most that is ever reserved.", lambda s: s.kv_bytes_limit),
)
_COUNTERS: Final[Sequence[tuple[str, str, Read]]] = (
    ("mbd_prompt_tokens", "Prompt tokens computed.", lambda s: s.num_prompt_tokens),
    ("mbd_generated_tokens", "Tokens of completions.", lambda s: s.num_generated_tokens),
    ("mbd_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hit_tokens),
    ("mbd_drafted_tokens", "Tokens proposed by speculation.", lambda s: s.num_drafted),
    ("mbd_accepted_tokens", "Proposed tokens that were right.", lambda s: s.num_accepted),
)


class Metrics:
    """Counters and histograms of one server.

    Args:
        engines: gives the open ones by name, each time metrics are asked for.
    """

    def __init__(self, engines: Callable[[], Mapping[str, AsyncLLM]]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mbd_requests",
            "Requests that have been answered.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "mbd_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token_seconds = Histogram(
            "mbd_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._token_seconds = Histogram(
            "mbd_time_between_tokens_seconds",
            "Between the tokens of one completion; the mean of those that reach the client together.",
            ("model",),
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engines))

    def request_ended(self, *, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request; `endpoint` is the path as it is documented."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Of a request to a model that is served."""
        self._first_token_seconds.labels(model).observe(seconds)

    def token_seconds(self, model: str) -> Callable[[float], None]:
        """Takes the seconds between two tokens of a model's completion, time after time."""
        observe: Callable[[float], None] = self._token_seconds.labels(model).observe
        return observe

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the numbers of every open engine."""

    def __init__(self, engines: Callable[[], Mapping[str, AsyncLLM]]) -> None:
        self._engines = engines

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known without asking engines that are not open yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All of it, labelled with the model's name."""
        stats = {name: engine.stats() for name, engine in self._engines().items()}
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("model",))
            for model, each in stats.items():
                gauge.add_metric((model,), read(each))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("model",))
            for model, each in stats.items():
                counter.add_metric((model,), read(each))
            yield counter
        finished = CounterMetricFamily(
            "mbd_completions", "Completions that have ended, by reason.", labels=("model", "reason")
        )
        for model, each in stats.items():
            for reason, count in each.num_finished.items():
                finished.add_metric((model, reason), count)
        yield finished
