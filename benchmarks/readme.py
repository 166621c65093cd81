"""The benchmark section of the README: two short tables, the means, and how many rows we lose."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill

from benchmarks.results import Results
from benchmarks.start_up import START_UP_SIZE
from benchmarks.summary import (
    ENGINE,
    LLAMA,
    MEASURES,
    TRANSFORMERS,
    Comparison,
    Row,
    geometric_mean,
    variant_name,
)
from benchmarks.tables import number, setting, table
from benchmarks.weight_bits import bits_sentence

# transformers, then llama.cpp and ours at equal bits
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    (TRANSFORMERS, "float32", "transformers float32"),
    (LLAMA, "F32", "llama.cpp F32"),
    (ENGINE, "float32", "ours float32"),
    (LLAMA, "Q8_0", "llama.cpp Q8_0"),
    (ENGINE, "int8", "ours int8"),
    (LLAMA, "Q4_0", "llama.cpp Q4_0"),
    (ENGINE, "int4-pure", "ours int4"),
)
_CASE = (1, 128)  # sequences, prompt tokens
_TITLES = {
    "decode": "**Decode, tokens per second** (one sequence after a prompt of 128 tokens; higher is better)",
    "prefill": "**Prefill of 128 tokens, milliseconds** (lower is better)",
}
_EXPLANATION = """\
llama.cpp runs a Llama of the same layers, widths, heads and vocabulary, every matrix with integers of the
same width as ours beside it. {bits} int4 here has a 4-bit vocabulary to
compare with Q4_0, while the default of int4 keeps it at 8 bits."""
_LINK = """\
Every row, those in which we lose included, and how it was measured:
[docs/benchmarks.md](docs/benchmarks.md)."""


def readme_section(results: Results) -> str:
    """What stands between the markers."""
    parts = [setting(results, bandwidth=results.bandwidth)]
    for measure in MEASURES:
        parts += [_TITLES[measure], _short_table(results, measure)]
    explanation = fill(
        _EXPLANATION.format(bits=bits_sentence(results.weight_bits)), 110, break_on_hyphens=False
    )
    return "\n\n".join([*parts, explanation, *_summary_lines(results), _LINK])


def _short_table(results: Results, measure: str) -> str:
    found = {
        (row.peer, row.variant, row.size): row
        for row in results.rows
        if (row.sequences, row.prompt_tokens) == _CASE
    }
    columns = [column for column in _COLUMNS if any(key[:2] == column[:2] for key in found)]
    lines = []
    for size in dict.fromkeys(key[2] for key in found):
        rows = [found.get((peer, variant, size)) for peer, variant, _ in columns]
        lines.append([size, *("" if row is None else _value(row, measure) for row in rows)])
    return table(["", *(title for _, _, title in columns)], lines)


def _value(row: Row, measure: str) -> str:
    if measure == "decode":
        return number(row.decode_tokens_per_second)
    return number(row.prefill_seconds.median * 1e3)


def _mean(comparisons: Iterable[Comparison], measure: str) -> float:
    return geometric_mean(each.ratio.median for each in comparisons if each.measure == measure)


def _summary_lines(results: Results) -> list[str]:
    lines = []
    chosen = [each for each in results.comparisons if each.peer == LLAMA and each.has_equal_bits]
    if chosen:
        means = ", ".join(f"{measure} {_mean(chosen, measure):.2f}x" for measure in MEASURES)
        num_lost = sum(not each.is_won for each in chosen)
        lines.append(
            f"Over all rows that were measured, against llama.cpp (geometric mean): {means}; "
            f"{num_lost} of {len(chosen)} comparisons are lost."
        )
    costs = [
        f"{variant_name(each.variant)} {each.cost:+.2%}"
        for each in results.perplexity
        if each.variant != "float32"
    ]
    if costs:
        lines.append(
            f"Perplexity of the bundled model on held-out books, against float32: {'; '.join(costs)}."
        )
    starts = [
        f"{each.peer} {each.variant} {each.seconds.median:.2f} s"
        for each in results.start_up
        if each.model == START_UP_SIZE
    ]
    if starts:
        lines.append(f"Process start to first token, {START_UP_SIZE} shape: {'; '.join(starts)}.")
    return lines + [f"Not measured here: {each}." for each in results.absent]
