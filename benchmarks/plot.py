"""One plot: decode speed by size, runtime and precision."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Results
from benchmarks.summary import ENGINE, LLAMA, TRANSFORMERS

# (runtime, variant) -> label, colour: one hue per runtime, darker for fewer bits
_SERIES = {
    (TRANSFORMERS, "float32"): ("transformers float32", "#9e9e9e"),
    (LLAMA, "F32"): ("llama.cpp F32", "#fdd0a2"),
    (ENGINE, "float32"): ("modernbert-decoder float32", "#c6dbef"),
    (LLAMA, "Q8_0"): ("llama.cpp Q8_0", "#fd8d3c"),
    (ENGINE, "int8"): ("modernbert-decoder int8", "#4292c6"),
    (LLAMA, "Q4_0"): ("llama.cpp Q4_0", "#a63603"),
    (ENGINE, "int4-pure"): ("modernbert-decoder int4", "#08306b"),
}
_CASE = (1, 128)


def draw(results: Results, path: Path) -> None:
    """Grouped bars on a logarithmic axis, least and greatest round as whiskers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    rows = {
        (row.peer, row.variant, row.size): row
        for row in results.rows
        if (row.sequences, row.prompt_tokens) == _CASE
    }
    sizes = list(dict.fromkeys(key[2] for key in rows))
    series = [key for key in _SERIES if any(found[:2] == key for found in rows)]
    figure, axes = plt.subplots(figsize=(9, 4.5), dpi=150, layout="constrained")
    width = 0.86 / max(1, len(series))
    for i, key in enumerate(series):
        label, colour = _SERIES[key]
        places = [x for x, size in enumerate(sizes) if (*key, size) in rows]
        found = [rows[(*key, sizes[x])] for x in places]
        speeds = [row.decode_tokens_per_second for row in found]
        whiskers = [
            [speed - 1 / row.step_seconds.high for speed, row in zip(speeds, found, strict=True)],
            [1 / row.step_seconds.low - speed for speed, row in zip(speeds, found, strict=True)],
        ]
        offsets = [x + (i - (len(series) - 1) / 2) * width for x in places]
        axes.bar(offsets, speeds, width * 0.94, color=colour, label=label)
        axes.errorbar(
            offsets, speeds, yerr=whiskers, fmt="none", ecolor="#333333", elinewidth=0.7, capsize=1.5
        )
        for x, row in zip(offsets, found, strict=True):
            place = (x, 1 / row.step_seconds.low)  # above the whisker
            text = f"{row.decode_tokens_per_second:.0f}"
            axes.annotate(text, place, (0, 3), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("tokens per second (logarithmic)")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_title(
        f"Decode, one sequence, prompt of 128 tokens: {results.machine['cpu']}, {results.threads} threads",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    figure.legend(fontsize=7.5, frameon=False, ncols=4, loc="outside lower center")
    figure.savefig(path)
    plt.close(figure)
