"""How many bits our weights take, scales included, and how that is told.

Blocks must divide a matrix's width, so the figure depends on the size, and in the layers it is a mean over
their matrices. Pure functions on results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.summary import variant_name


@dataclass(frozen=True)
class WeightBits:
    """Bits per weight of one size in one variant: in the layers and head, and in the vocabulary matrix."""

    size: str
    variant: str
    layers: float
    vocabulary: float


def range_text(values: Iterable[float]) -> str:
    """The least and the greatest, or the one that all are.

    >>> range_text([8.125, 8.25]), range_text([32.0, 32.0])
    ('8.125 to 8.25', '32')
    """
    listed = list(values)
    low, high = (f"{value:.3f}".rstrip("0").rstrip(".") for value in (min(listed), max(listed)))
    return low if low == high else f"{low} to {high}"


def bits_line(bits: Sequence[WeightBits]) -> str:
    """Every variant, over all sizes; empty where nothing is known."""
    if not bits:
        return ""
    parts = []
    for variant in dict.fromkeys(each.variant for each in bits):
        layers, vocabulary = _of(bits, variant)
        parts.append(f"{variant_name(variant)} {range_text(layers)} / {range_text(vocabulary)}")
    return (
        "Bits per weight of ours in the layers / the vocabulary, scales included, over the sizes of this "
        f"run: {'; '.join(parts)} (llama.cpp: Q8_0 8.5, Q4_0 4.5)."
    )


def bits_sentence(bits: Sequence[WeightBits]) -> str:
    """How ours compare with llama.cpp's at equal bits; without figures for results that hold none."""
    variants = {each.variant for each in bits}
    if not {"int8", "int4-pure"} <= variants:
        return (
            "With the scales, ours take fewer bits a weight than the 8.5 of Q8_0 and no more than the 4.5 of "
            "Q4_0: our blocks are longer."
        )
    int8 = range_text(each for part in _of(bits, "int8") for each in part)
    layers, vocabulary = (range_text(part) for part in _of(bits, "int4-pure"))
    return (
        f"With the scales, ours take {int8} bits a weight where Q8_0 takes 8.5, and {layers} ({vocabulary} "
        "in the vocabulary) where Q4_0 takes 4.5: our blocks are longer."
    )


def _of(bits: Iterable[WeightBits], variant: str) -> tuple[list[float], list[float]]:
    chosen = [each for each in bits if each.variant == variant]
    return [each.layers for each in chosen], [each.vocabulary for each in chosen]
