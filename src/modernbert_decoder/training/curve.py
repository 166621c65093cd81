"""The curve of a run as a table and, where matplotlib is installed, as a picture.

Knows the entries of the log and nothing else.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

COLUMNS: Final = ("step", "tokens", "loss", "learning_rate", "tokens_per_second")
_BITS_PER_BYTE: Final = "eval_bits_per_byte"
_LOSS: Final = "#0072b2"
_HELD_OUT: Final = "#d55e00"


def curve_table(history: Sequence[Mapping[str, float]], *, judged: Sequence[str] = (_BITS_PER_BYTE,)) -> str:
    """The log as CSV; `judged` are the columns of what was measured on held-out texts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *judged], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entry for entry in history if any(name in entry for name in ("loss", *judged)))
    return text.getvalue()


def draw_curve(
    history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    title: str,
    loss_label: str = "training loss (nats per token)",
    judged: tuple[str, str] = (_BITS_PER_BYTE, "held-out bits per byte"),
) -> bool:
    """Draw the loss, and what was measured on held-out texts, over tokens.

    Args:
        history: entries of the log.
        path: of the picture.
        title: above it.
        loss_label: of the left axis.
        judged: key in the log of what was measured, and label of the right axis.

    Returns:
        False where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [(entry["tokens"] / 1e6, entry["loss"]) for entry in history if "loss" in entry]
    key, judged_label = judged
    held_out = [(entry["tokens"] / 1e6, entry[key]) for entry in history if key in entry]
    axes.set_title(title)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel(loss_label, color=_LOSS)
    axes.grid(alpha=0.3)
    if losses:
        axes.plot(*zip(*losses, strict=True), color=_LOSS, linewidth=1)
    if held_out:
        other = axes.twinx()
        other.set_ylabel(judged_label, color=_HELD_OUT)
        other.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", markersize=3, linewidth=1)
    figure.savefig(path, dpi=120)
    return True
