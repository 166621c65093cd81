"""The page and the plot of a throughput run, made from its results alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Setting
from benchmarks.summary import ENGINE
from benchmarks.tables import number, setting, spread_text, table
from benchmarks.throughput.measure import MemoryLine, Row

FORMAT = 2
# (size, least ratio against transformers' pipeline with our best dtype)
TARGETS = (("17m", 3.0), ("150m", 1.5))
_SETTING = (
    "Random classifiers of the released shapes (77 labels) with the released tokenizer. Every runtime "
    "is a process of its own that loads once; rounds are interleaved and the first is dropped. Ours is "
    "`LLM.iter_classify` on one list of texts, in the order given. transformers is its own "
    '`pipeline("text-classification")` in float32 with the batch size that was fastest on a part of the same '
    "texts. Tokenization is included on both sides. Agreement is the share of labels equal to transformers': "
    "on random weights the best labels lie close together, so it is a lower bound."
)
# Memory over many texts counts as flat while its second half stays within this share of its middle.
_FLAT_SHARE = 0.05


@dataclass(frozen=True)
class ThroughputResults(Setting):
    """One run."""

    is_quick: bool
    rows: list[Row]
    memory: list[MemoryLine]


def page(results: ThroughputResults) -> str:
    """docs/throughput.md."""
    return (
        "\n\n".join(
            [
                "# Throughput of classification",
                "Written by `make bench-throughput` (`python -m benchmarks.throughput`) from one run.",
                setting(results),
                _SETTING,
                "## Numbers to hold",
                _claims(results),
                "## Documents per second",
                _rows(results.rows),
                _bandwidths(results.rows),
                "## Memory",
                _memory(results.memory),
                "![Resident memory over many texts](throughput-memory.png)",
            ]
        )
        + "\n"
    )


def best_ratios(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """(size, corpus) -> the engine's row with the greatest median ratio."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.runtime == ENGINE and row.ratio is not None:
            key = (row.size, row.corpus)
            if key not in best or row.ratio.median > best[key].ratio.median:
                best[key] = row
    return best


def growth(line: MemoryLine) -> float:
    """How far memory moved after the first half, relative to its middle: (greatest - least) / middle."""
    later = [sample.bytes for sample in line.samples[len(line.samples) // 2 :]]
    middle = line.samples[len(line.samples) // 2].bytes
    return (max(later) - min(later)) / middle


def _claims(results: ThroughputResults) -> str:
    best = best_ratios(results.rows)
    rows = []
    for size, target in TARGETS:
        for (found_size, corpus), row in best.items():
            if found_size == size:
                verdict = "held" if row.ratio.median >= target else "**not held**"
                measured = f"{spread_text(row.ratio)} ({row.variant})"
                rows.append(
                    [f"{size}, {corpus} texts, against transformers", f"{target}x", measured, verdict]
                )
    for line in results.memory:
        moved = growth(line)
        verdict = "held" if moved <= _FLAT_SHARE else "**not held**"
        what = f"memory over {line.count:,} texts, {line.size} {line.variant}: movement in the second half"
        rows.append([what, f"{_FLAT_SHARE:.0%}", f"{moved:.1%}", verdict])
    return table(["what", "at least, or at most", "measured", ""], rows)


def _rows(rows: Iterable[Row]) -> str:
    header = ["size", "texts", "runtime", "dtype", "batch", "rounds", "documents/s", "against transformers"]
    header += ["peak MB", "labels agree"]
    return table(
        header,
        [
            [
                row.size,
                f"{row.corpus} ({row.num_texts:,})",
                row.runtime,
                row.variant,
                str(row.batch_size) if row.batch_size else "",
                str(row.rounds),
                spread_text(row.documents_per_second),
                spread_text(row.ratio) if row.ratio else "",
                number(row.peak_memory_bytes / 1e6),
                f"{row.agreement:.1%}",
            ]
            for row in rows
        ],
    )


def _bandwidths(rows: Iterable[Row]) -> str:
    found = {f"{row.size} {row.corpus}": row.bandwidth for row in rows}
    listed = "; ".join(f"{name} {spread_text(spread, scale=1e-9)}" for name, spread in found.items())
    return (
        "How fast memory is depends on neighbours on the same hardware and on where the processors lie, "
        f"neither of which the system sees. Before the rounds it was read, in GB/s, at: {listed}."
    )


def _memory(lines: Iterable[MemoryLine]) -> str:
    return "\n\n".join(
        f"{line.count:,} short texts through one call of `iter_classify` ({line.size}, {line.variant}): "
        f"{line.seconds:.0f} s, resident memory {line.samples[0].bytes / 1e6:.0f} MB after "
        f"{line.samples[0].texts:,} texts and {line.samples[-1].bytes / 1e6:.0f} MB at the end."
        for line in lines
    )


def draw_memory(lines: Iterable[MemoryLine], path: Path) -> None:
    """Resident memory against texts done."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), dpi=150, layout="constrained")
    for line in lines:
        axes.plot(
            [sample.texts for sample in line.samples],
            [sample.bytes / 1e6 for sample in line.samples],
            label=f"{line.size} {line.variant}",
        )
    axes.set_xlabel("texts classified")
    axes.set_ylabel("resident memory, MB")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
