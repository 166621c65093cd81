"""docs/benchmarks.md: method, numbers to hold, every comparison, every row, the rows in which we lose."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.claims import check_claims
from benchmarks.coverage import DEFAULT_SIZES
from benchmarks.quantizing import TIME_HEADER, time_cells
from benchmarks.results import Results
from benchmarks.shapes import SHAPES
from benchmarks.summary import ENGINE, MEASURES, Comparison, Row, variant_name
from benchmarks.tables import number, setting, spread_text, table
from benchmarks.weight_bits import bits_line

_METHOD = """\
Weights are random, of the released shapes. Every runtime is a process of its own that loads once and then
sits blocked while another one is timed; rounds are interleaved (A B C A B C) and the first is dropped. A
round's decode time is the mean over its steps, and a step is the whole of it: for ours scheduling, network,
sampling and detokenization; for llama.cpp `llama_decode` and the argmax; for transformers forward (SDPA,
`DynamicCache`) and the argmax, without `generate`, which is slower. Prefill computes the logits of the last
position only.

llama.cpp runs a Llama of the same layers, widths, heads and vocabulary through llama-cpp-python, flash
attention at its default (on), its embedding serving as output matrix and quantized like all others. A Llama
attends to the whole context in every layer, which costs it at long prompts, and has no dense layer in its
head, which saves it a little. Peak memory is the high-water mark of the process during the row."""

_ROWS_LEGEND = """\
GB/s: the bytes a step has to read (weights once, keys and values of every sequence) over the median step
time; the share is of the read bandwidth measured in the same round over 1 GiB. Models that fit into the
last-level cache can exceed what memory delivers. In brackets: least and greatest round. Perplexity: of the
bundled model, against float32."""

_RATIOS_LEGEND = """\
How many times faster ours is: the ratio of times within each round, then the median (least to greatest)."""


def full_page(results: Results) -> str:
    """The page, from the results alone."""
    claims = [[each.what, each.bound, each.measured, each.verdict] for each in check_claims(results)]
    sections = [
        "# Benchmarks",
        "Written by `make bench` (`benchmarks/run.py`) from one run. "
        "The PyTorch classes have [a page of their own](benchmarks-pytorch.md).",
        setting(results, bandwidth=results.bandwidth),
        _METHOD,
        _contention(results),
        *(f"{peer} on this machine: {text}." for peer, text in results.features.items()),
        bits_line(results.weight_bits),
        *(f"{each}." for each in results.absent),
        *results.notes,
        _unmeasured_sizes(results),
        "## Numbers to hold",
        table(["what", "at least, or at most", "measured", ""], claims),
        "![Decode speed by size, runtime and precision](benchmarks.png)",
        "## Against llama.cpp and transformers",
        _RATIOS_LEGEND,
        _comparison_table(results.comparisons),
        "## Where we lose",
        _losses(results.comparisons),
        "## Every row",
        _ROWS_LEGEND,
        _row_table(results),
        *_start_up(results),
        *_overhead(results),
        *_cache(results),
        *_perplexity(results),
        *_quantizing(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _contention(results: Results) -> str:
    share = results.others_share
    if share is None:
        return ""
    return (
        f"Other programs took {share.median:.1%} of the processors meanwhile (median of the rounds, "
        f"{share.high:.1%} at most)."
    )


def _unmeasured_sizes(results: Results) -> str:
    measured = {row.size for row in results.rows}
    sizes = [size for size in SHAPES if size not in measured]
    if not sizes:
        return ""
    return (
        f"Sizes that were not measured: {', '.join(sizes)}. All runtimes and precisions of a size are loaded "
        "at once and take turns, so that every larger size needs more memory and longer rounds; the default "
        f"is {', '.join(DEFAULT_SIZES)}, and `--sizes` chooses others."
    )


def _comparison_table(comparisons: Iterable[Comparison]) -> str:
    grouped: dict[tuple[str, str, str, str], dict[str, Comparison]] = {}
    for each in comparisons:
        case = f"{each.sequences} x {each.prompt_tokens}"
        key = (each.size, case, variant_name(each.variant), f"{each.peer} {each.peer_variant}")
        grouped.setdefault(key, {})[each.measure] = each
    lines = [
        [*key, *(spread_text(pair[measure].ratio) if measure in pair else "" for measure in MEASURES)]
        for key, pair in grouped.items()
    ]
    return table(["size", "sequences x prompt", "ours", "against", *MEASURES], lines)


def _losses(comparisons: Iterable[Comparison]) -> str:
    lost = sorted((each for each in comparisons if not each.is_won), key=lambda each: each.ratio.median)
    if not lost:
        return "In no comparison of this run."
    lines = [
        [
            f"{each.measure}, {each.size}, {each.sequences} x {each.prompt_tokens}",
            variant_name(each.variant),
            f"{each.peer} {each.peer_variant}",
            spread_text(each.ratio),
        ]
        for each in lost
    ]
    return table(["what", "ours", "against", "times as fast"], lines)


def _row_table(results: Results) -> str:
    costs = {each.variant: f"{each.cost:+.2%}" for each in results.perplexity}
    header = ["size", "runtime", "precision", "sequences x prompt", "new tokens", "rounds", "prefill ms"]
    header += ["prefill tok/s", "decode ms/step", "decode tok/s", "GB/s", "share", "peak MB", "perplexity"]
    return table(header, [_cells(row, costs.get(row.variant, "")) for row in results.rows])


def _cells(row: Row, perplexity_cost: str) -> list[str]:
    share, rate = row.bandwidth_share, row.achieved_bytes_per_second
    return [
        row.size,
        row.peer,
        variant_name(row.variant),
        f"{row.sequences} x {row.prompt_tokens}",
        str(row.new_tokens),
        str(row.rounds),
        spread_text(row.prefill_seconds, scale=1e3),
        number(row.prefill_tokens_per_second),
        spread_text(row.step_seconds, scale=1e3),
        number(row.decode_tokens_per_second),
        "" if rate is None else number(rate / 1e9),
        "" if share is None else f"{share.median:.0%}",
        number(row.peak_memory_bytes / 1e6),
        perplexity_cost if row.peer == ENGINE else "",
    ]


def _start_up(results: Results) -> list[str]:
    if not results.start_up:
        return []
    lines = [
        [
            f"{each.peer} {each.variant}".strip(),
            each.model,
            each.what,
            spread_text(each.seconds),
            number(each.peak_memory_bytes / 1e6),
        ]
        for each in results.start_up
    ]
    legend = (
        "Seconds from process start to the first output of fresh processes, their files in the file cache."
    )
    return ["## Start-up", legend, table(["runtime", "model", "what", "seconds", "peak MB"], lines)]


def _overhead(results: Results) -> list[str]:
    if not results.overhead:
        return []
    lines = [
        [each.sampling, f"{each.share.median:.1%}", spread_text(each.rest_seconds, scale=1e6)]
        for each in results.overhead
    ]
    legend = "Of a decode step at 17m int8, one sequence."
    header = ["sampling", "share of the step", "microseconds"]
    return ["## Everything but the network", legend, table(header, lines)]


def _cache(results: Results) -> list[str]:
    if not results.cache:
        return []
    lines = [
        [each.size, number(each.buffer_bytes / 1e6), number(each.naive_bytes / 1e6), f"{each.ratio:.3f}"]
        for each in results.cache
    ]
    legend = (
        f"One sequence of {results.cache[0].length:,} tokens in float32, the slack of the rings included."
    )
    return ["## Keys and values", legend, table(["size", "MB", "every layer in full, MB", "ratio"], lines)]


def _perplexity(results: Results) -> list[str]:
    if not results.perplexity:
        return []
    lines = [
        [
            variant_name(each.variant),
            f"{each.perplexity:.3f}",
            "" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}",
            f"{each.cost:+.2%}",
        ]
        for each in results.perplexity
    ]
    legend = f"The bundled model on the held-out books, {results.perplexity[0].num_scored:,} tokens scored."
    return [
        "## Perplexity",
        legend,
        table(["precision", "perplexity", "bits per byte", "against float32"], lines),
    ]


def _quantizing(results: Results) -> list[str]:
    if not results.quantizing:
        return []
    legend = (
        "Seconds to round and pack every matrix of a model, one at a time, on random values; reading and "
        "writing files is not counted."
    )
    return ["## Quantizing", legend, table(TIME_HEADER, map(time_cells, results.quantizing))]
