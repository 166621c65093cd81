"""`mbd bench`: how fast this machine prefills and decodes a model, format by format.

Only the network is timed, through the runtime that the engine uses, with prompts in the scheduler's chunks.
Comparisons with other software are in `benchmarks/`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from modernbert_decoder.cli.completion_options import BLOCK_DTYPES, revision_option, threads_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, count_text, rate_text, write, write_json, write_table
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from modernbert_decoder.architecture import DecoderArchitecture
    from modernbert_decoder.engine.runtime import Runtime
    from modernbert_decoder.engine.weights import Weights
    from modernbert_decoder.quantization import QuantizationScheme

PROMPT_TOKENS: Final = 128
DECODE_TOKENS: Final = 64
BATCHES: Final = (1, 8)
_PREFILLS: Final = 3
_SIZES: Final = ("17m", "32m", "68m", "150m", "400m", "1b")


@dataclass(frozen=True)
class Subject:
    """What is measured: a model in memory or on disk, and the formats it can be run in."""

    name: str
    architecture: DecoderArchitecture
    schemes: Sequence[QuantizationScheme]
    weights: Callable[[QuantizationScheme], Weights]


@dataclass(frozen=True)
class Measurement:
    """One format and number of sequences; rates are of all sequences together.

    Attributes:
        decode_spread: 10th and 90th percentile of the tokens per second of single steps.
        decode_bytes_per_second: bytes that a step must read / median seconds of a step.
        bandwidth_share: of the read bandwidth; above 1 where weights stay in the processor's cache.
    """

    dtype: str
    sequences: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_spread: tuple[float, float]
    step_milliseconds: float
    decode_bytes_per_second: float
    bandwidth_share: float


@click.command("bench", short_help="Measure the speed of a model here.")
@click.argument("model", required=False)
@revision_option
@click.option(
    "--size", type=click.Choice(_SIZES), help="A released size with random weights, instead of MODEL."
)
@click.option(
    "--dtype", "dtypes", type=click.Choice(BLOCK_DTYPES), multiple=True, help="Only this format (repeatable)."
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str | None,
    *,
    revision: str | None,
    size: str | None,
    dtypes: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure prompts of 128 tokens and 64 decode steps, with 1 and 8 sequences.

    MODEL is `storyteller` by default. The table gives medians, the 10th to 90th percentile of single decode
    steps, and the share of the memory's read bandwidth that decoding reaches.
    """
    with interrupts_deferred():
        from modernbert_decoder.machine import read_bandwidth, usable_threads

    if size is not None and (model is not None or revision is not None):
        raise InputError("--size brings its own random weights; leave MODEL and --revision out, or --size")
    threads = threads or usable_threads()
    if size is None:
        subject = _stored_subject(model or "storyteller", revision, dtypes, threads=threads)
    else:
        subject = _random_subject(size, dtypes)
    bandwidth = read_bandwidth(threads=threads)
    measurements = list(_measure_all(subject, threads=threads, bandwidth=bandwidth))
    report = {
        "model": subject.name,
        "parameters": subject.architecture.num_parameters(),
        "threads": threads,
        "read_bytes_per_second": bandwidth,
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    if as_json:
        write_json(report)
    else:
        _print(report, measurements)


def _stored_subject(model: str, revision: str | None, dtypes: Sequence[str], *, threads: int) -> Subject:
    from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
    from modernbert_decoder.engine.weights import load_weights, resolve_scheme

    checkpoint = Checkpoint.open(find_checkpoint(model, revision=revision))
    architecture = checkpoint.architecture
    if architecture.head.value != "causal_lm":
        raise InputError(f"{model} has no language-model head, so there is nothing to decode")
    if architecture.max_position_embeddings < PROMPT_TOKENS + DECODE_TOKENS:
        raise InputError(
            f"{model} has a context of {architecture.max_position_embeddings} tokens; the benchmark needs "
            f"{PROMPT_TOKENS + DECODE_TOKENS}"
        )
    wanted = dtypes or ((None,) if checkpoint.scheme else BLOCK_DTYPES)
    schemes = [resolve_scheme(checkpoint, dtype, None) for dtype in wanted]
    return Subject(
        model, architecture, schemes, lambda scheme: load_weights(checkpoint, scheme, threads=threads)
    )


def _random_subject(size: str, dtypes: Sequence[str]) -> Subject:
    from modernbert_decoder.architecture import released_architecture
    from modernbert_decoder.quantization import QuantizationScheme

    architecture = released_architecture(size)
    schemes = [QuantizationScheme.named(dtype) for dtype in dtypes or BLOCK_DTYPES]
    name = f"{size} with random weights"
    return Subject(name, architecture, schemes, lambda scheme: random_weights(architecture, scheme))


def random_weights(architecture: DecoderArchitecture, scheme: QuantizationScheme) -> Weights:
    """Initializers of the right shapes: speed does not depend on values, so one random block is repeated."""
    import numpy as np

    from modernbert_decoder.costs import EMBEDDING
    from modernbert_decoder.engine.weights import EMBEDDING_ROWS

    generator = np.random.default_rng(0)
    normal = generator.standard_normal(1 << 20, np.float32) * np.float32(0.02)
    levels = generator.integers(0, 256, 1 << 20, np.uint8)
    weights: Weights = {}
    for name, shape in scheme.packed_shapes(architecture).items():
        if name.endswith(".data"):
            weights[name] = np.resize(levels, shape)
        elif name.endswith(".scales"):
            weights[name] = np.full(shape, 2e-4, np.float32)
        elif len(shape) == 2:
            weights[name] = np.resize(normal, shape)
        else:
            weights[name] = np.ones(shape, np.float32)
    data = weights.get(f"{EMBEDDING}.data")
    if data is not None:
        weights[EMBEDDING_ROWS] = data.reshape(len(data), -1)
    return weights


def _measure_all(subject: Subject, *, threads: int, bandwidth: float) -> Iterator[Measurement]:
    """Every format with every number of sequences, one session at a time."""
    from tqdm import tqdm

    from modernbert_decoder.engine.graph_cache import cached_graph
    from modernbert_decoder.engine.runtime import Runtime
    from modernbert_decoder.engine.weights import rotary_tables

    architecture = subject.architecture
    length = PROMPT_TOKENS + DECODE_TOKENS
    with tqdm(total=len(subject.schemes) * len(BATCHES), desc="bench", leave=False, disable=None) as bar:
        for scheme in subject.schemes:
            runtime = Runtime(
                architecture,
                cached_graph(architecture, scheme, num_positions=length),
                {**subject.weights(scheme), **rotary_tables(architecture, length)},
                num_slots=max(BATCHES),
                context_length=length,
                threads=threads,
                providers=("CPUExecutionProvider",),
            )
            for num_sequences in BATCHES:
                yield _measure(runtime, scheme, num_sequences, bandwidth=bandwidth)
                bar.update()


def _measure(
    runtime: Runtime, scheme: QuantizationScheme, num_sequences: int, *, bandwidth: float
) -> Measurement:
    from modernbert_decoder.cli.formats import decode_bytes

    _time_once(runtime, num_sequences, num_steps=2)  # the first calls allocate
    prefills: list[float] = []
    steps: list[float] = []
    for _ in range(_PREFILLS):
        prefill, decode = _time_once(runtime, num_sequences, num_steps=DECODE_TOKENS)
        prefills.append(prefill)
        steps += decode
    step = statistics.median(steps)
    deciles = statistics.quantiles(steps, n=10)
    step_bytes = decode_bytes(
        runtime.architecture,
        scheme,
        context_length=PROMPT_TOKENS + DECODE_TOKENS // 2,
        num_sequences=num_sequences,
    )
    return Measurement(
        dtype=scheme.name,
        sequences=num_sequences,
        prefill_tokens_per_second=num_sequences * PROMPT_TOKENS / statistics.median(prefills),
        decode_tokens_per_second=num_sequences / step,
        decode_spread=(num_sequences / deciles[-1], num_sequences / deciles[0]),
        step_milliseconds=step * 1e3,
        decode_bytes_per_second=step_bytes / step,
        bandwidth_share=step_bytes / step / bandwidth,
    )


def _time_once(runtime: Runtime, num_sequences: int, *, num_steps: int) -> tuple[float, list[float]]:
    """Seconds to prefill all prompts, and seconds of each decode step; greedy choice included."""
    import numpy as np

    from modernbert_decoder.engine.calls import Row
    from modernbert_decoder.engine.llm import DEFAULT_CHUNK_SIZE

    size = runtime.architecture.vocab_size
    prompts = np.random.default_rng(1).integers(0, size, (num_sequences, PROMPT_TOKENS)).tolist()
    rows = [Row(runtime.cache.allocate(), prompt) for prompt in prompts]
    per_chunk = max(1, DEFAULT_CHUNK_SIZE // PROMPT_TOKENS)
    started = time.perf_counter()
    for first in range(0, num_sequences, per_chunk):
        chunk = rows[first : first + per_chunk]
        for row, logits in zip(chunk, runtime.step(chunk), strict=True):
            row.token_ids = (int(logits[0].argmax()),)
    prefill_seconds = time.perf_counter() - started
    step_seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        for row, logits in zip(rows, runtime.step(rows), strict=True):
            row.token_ids = (int(logits[0].argmax()),)
        step_seconds.append(time.perf_counter() - started)
    for row in reversed(rows):
        runtime.cache.free(row.slot)
    return prefill_seconds, step_seconds


def _print(report: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    write(
        f"{report['model']}: {count_text(report['parameters'])} parameters, {report['threads']} threads, "
        f"memory read at {bytes_text(report['read_bytes_per_second'])}/s\n\n"
    )
    rows = [
        (
            m.dtype,
            str(m.sequences),
            rate_text(m.prefill_tokens_per_second),
            rate_text(m.decode_tokens_per_second),
            "-".join(rate_text(rate) for rate in m.decode_spread),
            f"{m.step_milliseconds:.2f}",
            f"{bytes_text(m.decode_bytes_per_second)}/s",
            f"{m.bandwidth_share:.0%}",
        )
        for m in measurements
    ]
    header = (
        "format",
        "sequences",
        "prefill tokens/s",
        "decode tokens/s",
        "spread",
        "ms/step",
        "read",
        "of memory",
    )
    write_table(header, rows)
    if any(m.bandwidth_share > 1 for m in measurements):
        write("\nAbove 100 %: the weights stay in the processor's cache.\n")
