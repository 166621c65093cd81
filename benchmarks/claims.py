"""The numbers to hold of docs/design.md, checked against the results of a run.

A claim is held, not held, or not measured; each says with what number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.coverage import missing_cases, wanted_cases
from benchmarks.quantizing import QUANTIZED_DTYPES, QUANTIZED_SIZE
from benchmarks.results import Results
from benchmarks.start_up import HELP, START_UP_SIZE
from benchmarks.summary import ENGINE, LLAMA, TRANSFORMERS, Comparison, geometric_mean, variant_name

_BANDWIDTH_SIZES = ("68m", "150m", "400m", "1b")
_CACHE_BOUNDS = {"17m": 0.45, "32m": 0.42}
_CACHE_BOUND_LARGER = 0.39


@dataclass(frozen=True)
class Claim:
    """One number to hold; `is_held` is None without a bound or without a measurement."""

    what: str
    bound: str
    measured: str
    is_held: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.is_held is None:
            return "reported" if self.measured else "not measured"
        return "held" if self.is_held else "**not held**"


def check_claims(results: Results) -> list[Claim]:
    """Every number to hold, in the order of the document."""
    checks: tuple[Callable[[Results], list[Claim]], ...] = (
        _against_transformers,
        _decode_against_llama,
        _prefill_against_llama,
        _bandwidth,
        _overhead,
        _start_up,
        _cache,
        _parity,
        _perplexity,
        _quantizing,
    )
    return [claim for check in checks for claim in check(results)]


def _least(comparisons: Iterable[Comparison]) -> Comparison:
    return min(comparisons, key=lambda each: each.ratio.median)


def case_text(comparison: Comparison) -> str:
    """`17m, 1 x 128, int8`."""
    what = variant_name(comparison.variant)
    return f"{comparison.size}, {comparison.sequences} x {comparison.prompt_tokens}, {what}"


def _against_transformers(results: Results) -> list[Claim]:
    what = "decode, one sequence, int8 against transformers (SDPA, float32)"
    chosen = [
        each
        for each in results.comparisons
        if (each.peer, each.measure, each.variant, each.sequences) == (TRANSFORMERS, "decode", "int8", 1)
    ]
    claims = []
    for name, bound, group in (
        ("17m", 12.0, [each for each in chosen if each.size == "17m"]),
        ("every size", 9.0, chosen),
    ):
        if not group:
            claims.append(Claim(f"{what}, {name}", f"{bound:g}x", "", None))
            continue
        least = _least(group)
        measured = f"{least.ratio.median:.1f}x at least ({case_text(least)})"
        claims.append(Claim(f"{what}, {name}", f"{bound:g}x", measured, least.ratio.median >= bound))
    return claims


def _equal_bits(results: Results, measure: str) -> list[Comparison]:
    return [
        each
        for each in results.comparisons
        if each.peer == LLAMA and each.has_equal_bits and each.measure == measure
    ]


def _decode_against_llama(results: Results) -> list[Claim]:
    what = "decode against llama.cpp at equal bits"
    chosen = _equal_bits(results, "decode")
    if not chosen:
        return [Claim(f"{what}, every row", "1.0x", "", None), Claim(f"{what}, mean", "1.15x", "", None)]
    least, mean = _least(chosen), geometric_mean(each.ratio.median for each in chosen)
    num_lost = sum(not each.is_won for each in chosen)
    won = f"{len(chosen) - num_lost} of {len(chosen)} rows"
    rows = f"{won}; least {least.ratio.median:.2f}x ({case_text(least)})"
    missing = missing_cases(results)
    if missing:
        labels = ", ".join(f"{each.size} {each.sequences} x {each.prompt_tokens}" for each in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        rows += f"; {len(missing)} of {len(wanted_cases())} cases were not measured ({labels}{more})"
    # Rows that were not measured cannot be won, nor are they lost.
    all_won = False if num_lost else None if missing else True
    return [
        Claim(f"{what}, every row", "1.0x", rows, all_won),
        Claim(f"{what}, geometric mean", "1.15x", f"{mean:.2f}x", mean >= 1.15),
    ]


def _prefill_against_llama(results: Results) -> list[Claim]:
    what = "prefill against llama.cpp at equal bits, geometric mean"
    chosen = _equal_bits(results, "prefill")
    if not chosen:
        return [Claim(what, "1.3x", "", None)]
    least, mean = _least(chosen), geometric_mean(each.ratio.median for each in chosen)
    measured = f"{mean:.2f}x; least {least.ratio.median:.2f}x ({case_text(least)})"
    return [Claim(what, "1.3x", measured, mean >= 1.3)]


def _bandwidth(results: Results) -> list[Claim]:
    what = "share of the memory-bandwidth limit in decode, int8, one sequence, 68m and larger"
    shares = {
        f"{row.size}, prompt {row.prompt_tokens}": row.bandwidth_share.median
        for row in results.rows
        if row.bandwidth_share
        and (row.peer, row.variant, row.sequences) == (ENGINE, "int8", 1)
        and row.size in _BANDWIDTH_SIZES
    }
    if not shares:
        return [Claim(what, "70 %", "", None)]
    measured = "; ".join(f"{name}: {share:.0%}" for name, share in shares.items())
    return [Claim(what, "70 %", measured, min(shares.values()) >= 0.7)]


def _overhead(results: Results) -> list[Claim]:
    bounds = {"greedy": 0.05, "top-k 64, 5 log-probabilities": 0.15, "unrestricted sampling": None}
    shares = {each.sampling: each.share.median for each in results.overhead}
    claims = []
    for name, bound in bounds.items():
        what = f"everything but the network in a 17m int8 decode step, {name}"
        share = shares.get(name)
        bound_text = "" if bound is None else f"{bound:.0%}"
        if share is None:
            claims.append(Claim(what, bound_text, "", None))
        else:
            claims.append(Claim(what, bound_text, f"{share:.1%}", None if bound is None else share <= bound))
    return claims


def _start_up(results: Results) -> list[Claim]:
    seconds = {
        (each.peer, each.variant, each.model or each.what): each.seconds.median for each in results.start_up
    }
    ours = seconds.get((ENGINE, "int8", START_UP_SIZE))  # the default
    theirs = seconds.get((TRANSFORMERS, "float32", START_UP_SIZE))
    what = "start to first token, `mbd generate`, 17m shape"
    claims = [
        Claim(what, "0.6 s", "", None) if ours is None else Claim(what, "0.6 s", f"{ours:.2f} s", ours <= 0.6)
    ]
    if ours is None or theirs is None:
        claims.append(Claim(f"{what}, against transformers", "a tenth", "", None))
    else:
        measured = f"1/{theirs / ours:.1f} ({theirs:.2f} s)"
        claims.append(Claim(f"{what}, against transformers", "a tenth", measured, ours <= theirs / 10))
    text = seconds.get((ENGINE, "", HELP))
    claims.append(
        Claim("`mbd --help`", "0.3 s", "", None)
        if text is None
        else Claim("`mbd --help`", "0.3 s", f"{text:.2f} s", text <= 0.3)
    )
    return claims


def _cache(results: Results) -> list[Claim]:
    claims = []
    for each in results.cache:
        bound = _CACHE_BOUNDS.get(each.size, _CACHE_BOUND_LARGER)
        what = f"KV bytes at {each.length:,} tokens against every layer in full, {each.size}"
        claims.append(Claim(what, f"{bound}x", f"{each.ratio:.3f}x", each.ratio <= bound))
    return claims


def _parity(results: Results) -> list[Claim]:
    logits = "logits, float32, against transformers: max abs difference / max abs reference"
    tokens = "greedy tokens, float32, against transformers, ties aside"
    if not results.parity:
        return [Claim(logits, "1e-4", "", None), Claim(tokens, "identical", "", None)]
    error = max(each.logit_error for each in results.parity)
    differing = sum(each.num_differing for each in results.parity)
    total = sum(each.num_tokens for each in results.parity)
    ties = sum(each.num_ties for each in results.parity)
    return [
        Claim(logits, "1e-4", f"{error:.1e}", error <= 1e-4),
        Claim(tokens, "identical", f"{differing} of {total} differ ({ties} ties)", differing == 0),
    ]


def _perplexity(results: Results) -> list[Claim]:
    costs = {each.variant: each.cost for each in results.perplexity}
    claims = []
    for variant, bound, name in (
        ("int8", 0.005, "int8"),
        ("int4", 0.03, "int4 (8-bit vocabulary, the default)"),
    ):
        what = f"perplexity cost of {name}, bundled model"
        cost = costs.get(variant)
        if cost is None:
            claims.append(Claim(what, f"{bound:.1%}", "", None))
        else:
            claims.append(Claim(what, f"{bound:.1%}", f"{cost:+.2%}", cost <= bound))
    return claims


def _quantizing(results: Results) -> list[Claim]:
    seconds = {each.dtype: each.seconds for each in results.quantizing if each.size == QUANTIZED_SIZE}
    claims = []
    for dtype in QUANTIZED_DTYPES:
        what = f"quantizing every matrix of {QUANTIZED_SIZE} to {dtype}"
        if dtype not in seconds:
            claims.append(Claim(what, "60 s", "", None))
        else:
            claims.append(Claim(what, "60 s", f"{seconds[dtype]:.1f} s", seconds[dtype] <= 60))
    return claims
