"""Documents: every format, every document once an epoch, and reading on from any place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.documents import (
    Document,
    DocumentStream,
    LocalFiles,
    Place,
    matching_files,
    open_source,
)
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.recipe import DataRecipe

TEXTS = [f"document {i}, a fox and a hen" for i in range(23)]


def parquet(path: Path, texts: list[Any], key: str = "text") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=4)


def write(folder: Path, kind: str, texts: list[str] = TEXTS) -> DataRecipe:
    """The same documents in one file of some format."""
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{text}\n" for text in texts)
    rows = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    if kind == "lines":
        (folder / "a.txt").write_text(lines, encoding="utf-8")
    elif kind == "lines.gz":
        (folder / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text(rows, encoding="utf-8")
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    elif kind == "parquet":
        parquet(folder / "a.parquet", list(texts))
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return DataRecipe(files=(str(folder),), text_documents="file" if kind == "files" else "line")


KINDS = ("lines", "lines.gz", "jsonl", "jsonl.gz", "parquet", "files")


def read(stream: DocumentStream, count: int) -> list[Document]:
    return [stream.read_block(1)[0] for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_reads_every_document_once(tmp_path: Path, kind: str) -> None:
    stream = DocumentStream(open_source(write(tmp_path, kind)), seed=3)
    documents = read(stream, len(TEXTS))
    assert sorted(map(str, documents)) == sorted(TEXTS)
    if kind != "files":
        assert documents == TEXTS
    stream.close()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_every_place(tmp_path: Path, kind: str) -> None:
    source = open_source(write(tmp_path, kind))
    stream = DocumentStream(source, seed=3)
    whole = read(stream, 2 * len(TEXTS) + 5)
    stream.close()
    for taken in (0, 1, 3, 4, 5, len(TEXTS) - 1, len(TEXTS), len(TEXTS) + 1, 2 * len(TEXTS)):
        first = DocumentStream(source, seed=3)
        read(first, taken)
        stored = json.loads(json.dumps(vars(first.place)))  # as a checkpoint keeps it
        first.close()
        second = DocumentStream(source, seed=3, place=Place(**stored))
        assert read(second, len(whole) - taken) == whole[taken:]
        second.close()


def test_order_of_files_follows_the_seed_and_changes_with_the_epoch(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "files"))

    def orders(seed: int) -> tuple[list[Document], list[Document]]:
        stream = DocumentStream(source, seed=seed)
        result = read(stream, len(TEXTS)), read(stream, len(TEXTS))
        stream.close()
        return result

    first, second = orders(1)
    assert first != second
    assert orders(1) == (first, second)
    assert orders(2)[0] != first


def test_a_block_ends_with_the_epoch(tmp_path: Path) -> None:
    stream = DocumentStream(open_source(write(tmp_path, "lines")), seed=0)
    assert [len(stream.read_block(10)) for _ in range(5)] == [10, 10, 3, 10, 10]
    assert stream.place.epoch == 1
    stream.close()


def test_parts_are_whole_lines_of_about_the_size_and_lose_nothing(tmp_path: Path) -> None:
    write(tmp_path, "lines")
    recipe = DataRecipe(files=(str(tmp_path / "*.txt"),), text_documents="parts", part_bytes=100)
    stream = DocumentStream(open_source(recipe), seed=0)
    parts: list[str] = []
    while sum(part.count("\n") + 1 for part in parts) < len(TEXTS):
        parts.append(str(stream.read_block(1)[0]))
    assert "\n".join(parts).split("\n") == TEXTS
    assert all(100 <= len(part) + 1 < 160 for part in parts[:-1])
    stream.close()


def test_token_ids_are_read_from_their_column(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [[5, 6], [7], []], key="ids")
    stream = DocumentStream(open_source(DataRecipe(files=(str(tmp_path),), ids_key="ids")), seed=0)
    assert stream.read_block(9) == [[5, 6], [7]]
    stream.close()


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    stream = DocumentStream(open_source(write(tmp_path, "jsonl", ["a", "", "  \n", "b"])), seed=0)
    assert stream.read_block(9) == ["a", "b"]
    stream.close()


def test_data_without_a_document_ends_with_a_message_and_not_in_a_loop(tmp_path: Path) -> None:
    stream = DocumentStream(open_source(write(tmp_path, "lines", ["", " "])), seed=0)
    with pytest.raises(TrainingError, match="no document that is not empty"):
        stream.read_block(1)


def test_files_are_found_by_pattern_name_and_folder_and_excluded_by_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "wilde-1.txt", "wilde-2.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = matching_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], exclude=["wilde-*.txt"])
    assert [file.name for file in found] == ["a.txt", "b.txt"]
    with pytest.raises(InputError, match=r"no file matches '.*nothing"):
        matching_files([str(tmp_path / "nothing*")])
    with pytest.raises(InputError, match=r"match no file: wilde\.txt"):
        matching_files([str(tmp_path)], exclude=["wilde.txt"])
    with pytest.raises(InputError, match="all 4 files are excluded"):
        matching_files([str(tmp_path)], exclude=["*.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "in no known format"),
        ("a.txt", b"\xff\xfe bad", "is not UTF-8"),
        ("a.jsonl", b'{"text": ', "no JSON"),
        ("a.jsonl", b"[1]\n", "instead of an object"),
        ("a.jsonl", b'{"body": "x"}\n', "no 'text' among body; set data.text_key"),
        ("a.jsonl", b'{"text": 5}\n', "holds int instead of a text"),
        ("a.parquet", b"no parquet", "cannot read"),
    ],
)
def test_unreadable_data_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    stream = DocumentStream(open_source(DataRecipe(files=(str(tmp_path),))), seed=0)
    with pytest.raises(InputError, match=message):
        stream.read_block(1)
    stream.close()


def test_a_recipe_without_data_says_how_to_name_some() -> None:
    with pytest.raises(InputError, match="add --data FILES"):
        open_source(DataRecipe())


def test_a_dataset_is_streamed_and_read_on_from_every_place(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for shard in range(3):
        rows = [json.dumps({"text": f"{shard} {i}"}) for i in range(5)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    source = open_source(DataRecipe(dataset=str(tmp_path)))
    assert source.num_shards == 3
    stream = DocumentStream(source, seed=1)
    whole = read(stream, 33)
    assert sorted(map(str, whole[:15])) == sorted(f"{s} {i}" for s in range(3) for i in range(5))
    for taken in (0, 2, 5, 14, 15, 17):
        first = DocumentStream(source, seed=1)
        read(first, taken)
        stored = json.loads(json.dumps(vars(first.place)))
        second = DocumentStream(source, seed=1, place=Place(**stored))
        assert read(second, 33 - taken) == whole[taken:]


def test_local_files_know_that_they_changed(tmp_path: Path) -> None:
    recipe = write(tmp_path, "lines")
    before = LocalFiles(recipe).identity
    assert LocalFiles(recipe).identity == before
    with open(tmp_path / "a.txt", "a", encoding="utf-8") as file:
        file.write("one more\n")
    assert LocalFiles(recipe).identity != before
