"""The throughput benchmark's pure parts: ratios of paired rounds, claims, memory, results as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import from_json  # noqa: E402
from benchmarks.summary import ENGINE, TRANSFORMERS, Spread  # noqa: E402
from benchmarks.throughput.__main__ import PUBLICATION  # noqa: E402
from benchmarks.throughput.corpora import CORPORA, chapters_of  # noqa: E402
from benchmarks.throughput.measure import MemoryLine, MemorySample, Round, Row, make_row  # noqa: E402
from benchmarks.throughput.pipeline_worker import PipelineWorker  # noqa: E402
from benchmarks.throughput.report import (  # noqa: E402
    FORMAT,
    ThroughputResults,
    best_ratios,
    draw_memory,
    growth,
    page,
)


class Loaded:
    """What `make_row` looks at in a loaded worker."""

    def __init__(self, runtime: str, variant: str) -> None:
        self.runtime = runtime
        self.variant = variant


def answer(seconds: float, labels: list[str]) -> dict[str, Any]:
    return {"seconds": seconds, "labels": labels, "peak_memory_bytes": int(seconds * 1e8)}


# Two rounds, the second on a machine half as fast.
ROUNDS = [
    Round([answer(1.0, ["a", "b"]), answer(4.0, ["a", "c"])], 0.0, 5.0, 30e9),
    Round([answer(2.0, ["a", "b"]), answer(8.0, ["a", "c"])], 0.0, 10.0, 10e9),
]


def row(size: str = "17m", corpus: str = "short", dtype: str = "int8", ratio: float = 4.0) -> Row:
    spread = Spread(ratio, ratio, ratio)
    return Row(
        ENGINE,
        dtype,
        size,
        corpus,
        2,
        2,
        Spread(1.0, 1.0, 2.0),
        spread,
        10**8,
        0.5,
        None,
        Spread(2e10, 1e10, 3e10),
    )


def line(later: list[int]) -> MemoryLine:
    samples = [MemorySample(i, size) for i, size in enumerate([10, 50, *later])]
    return MemoryLine("int8", "17m", 100_000, 60.0, samples)


def results(rows: list[Row], memory: list[MemoryLine]) -> ThroughputResults:
    machine = {"cpu": "a processor", "flags": [], "logical_processors": 2, "memory_gib": 8, "system": "Linux"}
    return ThroughputResults(FORMAT, "2026-01-01", machine, 2, {"numpy": "2"}, False, rows, memory)


def test_ratios_are_taken_within_rounds() -> None:
    ours = make_row(Loaded(ENGINE, "int8"), 0, "short", "17m", ROUNDS, 32)
    assert ours.ratio == Spread(4.0, 4.0, 4.0)
    assert ours.documents_per_second == Spread(1.5, 1.0, 2.0)
    assert ours.agreement == 0.5
    assert ours.batch_size is None
    assert ours.peak_memory_bytes == 2e8
    assert ours.bandwidth == Spread(20e9, 10e9, 30e9)


def test_transformers_row_has_a_batch_size_and_no_ratio() -> None:
    theirs = make_row(Loaded(TRANSFORMERS, "float32"), 1, "short", "17m", ROUNDS, 32)
    assert theirs.ratio is None
    assert theirs.batch_size == 32
    assert theirs.agreement == 1.0


def test_claims_take_the_best_dtype() -> None:
    rows = [row(dtype="float32", ratio=2.0), row(dtype="int8", ratio=3.5)]
    assert best_ratios(rows)[("17m", "short")].variant == "int8"
    assert "| held |" in page(results(rows, [line([100, 101])]))


def test_a_claim_that_fails_is_published_as_not_held() -> None:
    text = page(results([row(ratio=2.9), row(size="150m", ratio=1.6)], [line([100, 100])]))
    assert text.count("**not held**") == 1


def test_the_page_says_how_fast_memory_was() -> None:
    assert "at: 17m short 20.0 (10.0 to 30.0)." in page(results([row()], [line([100, 101])]))


def test_growing_memory_is_not_flat() -> None:
    assert growth(line([100, 110, 120])) == pytest.approx(0.2)
    assert "**not held**" in page(results([row()], [line([100, 110, 120])]))


def test_results_survive_json() -> None:
    before = results([row()], [line([100, 101])])
    assert from_json(ThroughputResults, json.loads(json.dumps(asdict(before)))) == before


def test_corpora_give_the_texts_they_promise(shared: Path) -> None:
    lengths = []
    for corpus in CORPORA:
        texts = corpus.texts(shared, "150m")
        assert len(texts) == corpus.num_texts["150m"]
        assert len(set(texts)) > 0.9 * len(texts)
        lengths.append(sum(map(len, texts)) / len(texts))
    assert lengths == sorted(lengths)


def test_long_texts_begin_with_chapters_of_many_books_and_end_at_2000_tokens(shared: Path) -> None:
    from tokenizers import Tokenizer

    texts = CORPORA[2].texts(shared, "17m")
    tokenizer = Tokenizer.from_file(str(shared / "data" / "ettin-tokenizer" / "tokenizer.json"))
    lengths = [len(each.ids) for each in tokenizer.encode_batch(texts)]  # [CLS] and [SEP] are counted
    assert max(lengths) <= 2_001  # a word cut in two may take another token
    assert sum(length >= 1_999 for length in lengths) > len(texts) / 2
    assert min(lengths) > 700
    books = {
        path.name: "\n\n" + path.read_text(encoding="utf-8") for path in (shared / "corpus").glob("*.txt")
    }
    found = set()
    for text in texts:
        heading = text.split("\n", 1)[0]
        assert heading.isupper() or heading.lower().startswith("chapter")
        found.add(next(name for name, book in books.items() if "\n\n" + text in book))
    assert len(found) == len(texts)


def test_chapters_are_told_by_their_headings() -> None:
    long = "It was a long way to the sea. " * 150
    spoken = '"HELP! HELP! HELP!"'
    named = [f"CHAPTER {i}" if i % 2 else f"Chapter {i}. The way" for i in range(8)]
    book = "A preface.\n\n" + "".join(f"{name}\n\n{long}\n\n{spoken}\n\n{long}\n\n" for name in named)
    chapters = chapters_of(book + "A FABLE\n\nA short one.\n")
    assert [chapter.split("\n")[0] for chapter in chapters] == named
    assert all(chapter.count(long.strip()) == 2 for chapter in chapters)
    assert chapters_of(f"A SIGN ON A DOOR\n\n{long}") == []


def test_the_best_batch_size_is_that_of_the_fastest_try_and_sizes_take_turns() -> None:
    class Scripted(PipelineWorker):
        """Size 8 is the fastest; while it was tried first and last, something else ran."""

        def __init__(self) -> None:
            self.tried: list[int] = []

        def classify(self, *, texts: str, batch_size: int) -> dict[str, Any]:
            self.tried.append(batch_size)
            seconds = {1: [9, 5, 5, 5], 8: [9, 2, 9], 32: [3, 3, 3]}[batch_size]
            return {"seconds": seconds[self.tried.count(batch_size) - 1]}

    worker = Scripted()
    answer = worker.best_batch_size(texts="texts.json", sizes=[1, 8, 32], tries=3)
    assert answer == {"batch_size": 8, "seconds": {1: 5, 8: 2, 32: 3}}
    assert worker.tried == [1, *[1, 8, 32] * 3]


def test_the_page_is_that_of_the_newest_results() -> None:
    newest = max((ROOT / "benchmarks" / "results").glob("*-throughput.json"))
    assert page(PUBLICATION.read(newest)) == (ROOT / "docs" / "throughput.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "throughput-memory.png").is_file()


def test_memory_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_memory([line([100, 101])], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_too_small_a_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data" / "banking77").mkdir(parents=True)
    (tmp_path / "data" / "banking77" / "test.csv").write_text("text,category\nhow?,x\n")
    with pytest.raises(ValueError, match="short holds 1 texts"):
        CORPORA[0].texts(tmp_path, "17m")
