"""The curve of a run as a table and, where matplotlib is installed, as a picture.

Knows the entries of the log and nothing else.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

COLUMNS: Final = ("step", "tokens", "loss", "learning_rate", "tokens_per_second", "eval_bits_per_byte")
_LOSS: Final = "#0072b2"
_HELD_OUT: Final = "#d55e00"


def curve_table(history: Sequence[Mapping[str, float]]) -> str:
    """The log as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entry for entry in history if "loss" in entry or "eval_bits_per_byte" in entry)
    return text.getvalue()


def draw_curve(history: Sequence[Mapping[str, float]], path: Path, *, title: str) -> bool:
    """Draw loss and held-out bits per byte over tokens; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [(entry["tokens"] / 1e6, entry["loss"]) for entry in history if "loss" in entry]
    held_out = [
        (entry["tokens"] / 1e6, entry["eval_bits_per_byte"])
        for entry in history
        if "eval_bits_per_byte" in entry
    ]
    axes.set_title(title)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("training loss (nats per token)", color=_LOSS)
    axes.grid(alpha=0.3)
    if losses:
        axes.plot(*zip(*losses, strict=True), color=_LOSS, linewidth=1)
    if held_out:
        other = axes.twinx()
        other.set_ylabel("held-out bits per byte", color=_HELD_OUT)
        other.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", markersize=3, linewidth=1)
    figure.savefig(path, dpi=120)
    return True
