"""Rows come out of every format in order, whatever is in them, from any position on, and none is lost."""

from __future__ import annotations

import io
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs import inputs as inputs_module
from modernbert_decoder.jobs.inputs import Columns, Inputs, expand_files
from modernbert_decoder.jobs.readers import read_csv, read_jsonl, read_text, read_whole_text
from modernbert_decoder.jobs.rows import Position, RawRow, Record
from modernbert_decoder.jobs.standard_input import StreamDigest

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

Reader = Callable[..., Iterator[RawRow]]
BEGINNING = Position()


def rows(reader: Reader, data: bytes, **options: Any) -> list[tuple[int, Any]]:
    """(number, values or error) of each row."""
    return [
        (row.row, row.error or dict(row.values)) for row in reader(io.BytesIO(data), BEGINNING, **options)
    ]


def texts(reader: Reader, data: bytes) -> list[Any]:
    return [row.error or row.values["text"] for row in reader(io.BytesIO(data), BEGINNING)]


# text


def test_a_text_file_has_a_text_per_line_and_blank_lines_only_count() -> None:
    data = b"\xef\xbb\xbfone\r\n\n  \ntwo \nthree"
    assert rows(read_text, data) == [(1, {"text": "one"}), (4, {"text": "two "}), (5, {"text": "three"})]


def test_a_line_that_is_not_utf8_is_an_error_of_that_row_alone() -> None:
    data = "good\ncafé\n".encode("latin-1") + b"good\n"
    assert rows(read_text, data) == [
        (1, {"text": "good"}),
        (2, "not valid UTF-8: byte 4 of the row is 0xe9"),
        (3, {"text": "good"}),
    ]


@pytest.mark.parametrize("reader", [read_text, read_jsonl])
def test_a_line_longer_than_the_limit_is_an_error_and_is_skipped(reader: Reader) -> None:
    good = b'{"text": "x"}'
    data = good + b"\n" + b"a" * 50 + b"\n" + good + b"\n"
    found = rows(reader, data, max_bytes=40)
    assert [number for number, _ in found] == [1, 2, 3]
    assert found[1][1] == "the row is longer than 40 bytes"
    assert found[0][1] == found[2][1] or reader is read_text


def test_nul_bytes_and_every_script_pass_through() -> None:
    lines = ["a\0b", "مرحبا", "😀 \u200d", "x" * 1_000_000]
    assert texts(read_text, "\n".join(lines).encode()) == lines


def test_a_whole_file_is_one_text_with_its_line_breaks() -> None:
    assert rows(read_whole_text, b"\xef\xbb\xbfone\r\ntwo\n") == [(1, {"text": "one\r\ntwo\n"})]
    assert rows(read_whole_text, b"abcdef", max_bytes=5) == [(1, "the row is longer than 5 bytes")]


# JSONL

BAD_JSON = [
    (b'{"text": ', "not valid JSON: Expecting value at character 10"),
    (b"[1, 2]", "not a JSON object but a list"),
    (b'"text"', "not a JSON object but text"),
    (b"7", "not a JSON object but a number"),
    (b"null", "not a JSON object but null"),
    (b'{"text": NaN}', "not usable JSON: NaN is not a JSON number"),
    (b'{"text": "a", "x": 1e999}', "not usable JSON: the number 1e999 is beyond what a float can hold"),
    (b'{"text": "a", "x": [-1e400]}', "not usable JSON: the number -1e400 is beyond"),
    (b'{"text": "\xff"}', "not valid UTF-8: byte 11 of the row is 0xff"),
    (b"[" * 100_000, "not usable JSON: maximum recursion depth exceeded"),
    (b'{"n": ' + b"1" * 5000 + b"}", "not usable JSON: Exceeds the limit"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data at character 15"),
]


@pytest.mark.parametrize(("line", "message"), BAD_JSON, ids=lambda value: str(value)[:20])
def test_a_malformed_json_line_is_told_with_its_number(line: bytes, message: str) -> None:
    found = rows(read_jsonl, b'{"text": "a"}\n' + line + b'\n\n{"text": "b"}\n')
    assert [number for number, _ in found] == [1, 2, 4]
    assert found[1][1].startswith(message)
    assert [found[0][1], found[2][1]] == [{"text": "a"}, {"text": "b"}]


def test_a_lone_surrogate_in_json_is_text() -> None:
    assert texts(read_jsonl, rb'{"text": "a\ud800b"}') == ["a\ud800b"]


# CSV


def test_csv_fields_may_hold_quotes_delimiters_and_line_breaks() -> None:
    data = b'\xef\xbb\xbfid,text\r\n1,"a ""b"", c"\r\n2,"two\r\nlines"\r\n\r\n3,\r\n'
    assert rows(read_csv, data) == [
        (1, {"id": "1", "text": 'a "b", c'}),
        (2, {"id": "2", "text": "two\r\nlines"}),
        (3, {"id": "3", "text": ""}),
    ]


def test_csv_fields_may_be_large() -> None:
    (row,) = rows(read_csv, b"text\n" + b"x" * 3_000_000 + b"\n")
    assert len(row[1]["text"]) == 3_000_000


BAD_CSV = [
    (b"x", "1 fields where the header has 2"),
    (b"x,y,z", "3 fields where the header has 2"),
    (b'x,"y" z', "not valid CSV: ',' expected after '\"'"),
    (b"x,caf\xe9", "bytes that are not valid UTF-8"),
    (b'x,"never closed', "a quote is opened and never closed"),
    (b'"x,never closed', "a quote is opened and never closed"),
]


@pytest.mark.parametrize(("line", "message"), BAD_CSV, ids=lambda value: str(value)[:20])
def test_a_malformed_csv_row_costs_itself_only(line: bytes, message: str) -> None:
    good = b"".join(b"%d,text\n" % number for number in range(5))
    found = rows(read_csv, b"id,text\n" + good + line + b"\n" + good)
    assert [number for number, _ in found] == list(range(1, 12))
    assert found[5][1].startswith(message)
    assert [values["id"] for _, values in found[:5] + found[6:]] == list("0123401234")


def test_an_open_quote_in_a_large_file_costs_one_row() -> None:
    good = b"1,text\n" * 100
    found = rows(read_csv, b"id,text\n" + good + b'2,"open\n' + good, max_bytes=300)
    assert [number for number, value in found if isinstance(value, str)] == [101]
    assert len(found) == 201


def test_a_csv_row_longer_than_the_limit_is_skipped() -> None:
    found = rows(read_csv, b"id,text\n1,a\n2," + b"b" * 3_000_000 + b"\n3,c\n", max_bytes=1_500_000)
    assert found == [
        (1, {"id": "1", "text": "a"}),
        (2, "not valid CSV: the row is longer than 1,500,000 bytes"),
        (3, {"id": "3", "text": "c"}),
    ]


# Reading on

FORMATS: dict[str, tuple[Reader, bytes]] = {
    "text": (read_text, "\n".join(["eins", "", "zwei ä", "\xff", "drei"]).encode("latin-1")),
    "jsonl": (read_jsonl, b'{"a": 1}\n\nbad\n{"a": "\xc3\xa4"}\n[]\n{"b": 2}'),
    "csv": (read_csv, b'\xef\xbb\xbfa,b\n1,2\n"3\n\xc3\xa4",4\n5\n\n"open,7\n8,9\n10,11\n'),
}


@pytest.mark.parametrize("name", FORMATS)
def test_reading_on_at_any_row_gives_the_same_rows(name: str) -> None:
    reader, data = FORMATS[name]
    whole = list(reader(io.BytesIO(data), BEGINNING))
    assert len(whole) >= 4
    for index, row in enumerate(whole):
        rest = list(reader(io.BytesIO(data), Position(0, row.end, row.row)))
        assert rest == whole[index + 1 :]


@given(
    table=st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=8)] * 2).filter(any), min_size=1
    ),
    start=st.integers(0, 10),
)
def test_whatever_the_csv_library_writes_is_read_back(table: list[tuple[str, str]], start: int) -> None:
    import csv

    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    data = buffer.getvalue().encode()
    whole = list(read_csv(io.BytesIO(data), BEGINNING))
    assert [tuple(row.values.values()) for row in whole] == table
    index = start % len(whole)
    rest = read_csv(io.BytesIO(data), Position(0, whole[index].end, whole[index].row))
    assert list(rest) == whole[index + 1 :]


@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(FORMATS)))
def test_no_bytes_at_all_make_a_reader_fail(data: bytes, name: str) -> None:
    numbers = [row.row for row in FORMATS[name][0](io.BytesIO(b"a\n" + data), BEGINNING)]
    assert numbers == sorted(set(numbers))


# Parquet


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_rows_are_read_across_row_groups_and_on_from_any_row(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(25)], "n": range(25)}, row_group_size=10
    )
    inputs = Inputs(files=(str(path),), columns=Columns(keep=("n",)))
    whole = list(inputs.records())
    assert [record.text for record in whole] == [f"text {i}" for i in range(25)]
    assert [record.kept["n"] for record in whole] == list(range(25))
    for index in (0, 9, 10, 17, 24):
        assert list(inputs.records(whole[index].end)) == whole[index + 1 :]


def test_parquet_values_are_carried_along_as_json_values(tmp_path: Path) -> None:
    import datetime
    import decimal

    columns = {
        "text": ["a"],
        "day": [datetime.date(2024, 2, 29)],
        "moment": [datetime.datetime(2024, 2, 29, 1, 2, 3)],
        "price": [decimal.Decimal("1.50")],
        "data": [b"\x00\xff"],
        "nothing": [float("nan")],
        "nested": [{"list": [1, 2.5]}],
    }
    inputs = Inputs(
        files=(str(write_parquet(tmp_path / "a.parquet", columns)),), columns=Columns(keep=("*",))
    )
    (record,) = inputs.records()
    assert json.loads(json.dumps(record.kept)) == {
        "text": "a",
        "day": "2024-02-29",
        "moment": "2024-02-29T01:02:03",
        "price": "1.50",
        "data": "AP8=",
        "nothing": None,
        "nested": {"list": [1, 2.5]},
    }


def test_a_null_in_a_parquet_column_is_an_error_of_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", None, "c"]})
    found = [record.error for record in Inputs(files=(str(path),)).records()]
    assert found == [None, "column 'text' holds null, not text", None]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" * 9 for i in range(5000)]})
    data = bytearray(path.read_bytes())
    data[100:5000] = b"\xff" * 4900
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet.*damaged"):
        list(Inputs(files=(str(path),)).records())


# Columns


def test_a_missing_column_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")
    write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]})
    (tmp_path / "a.txt").write_text("x\n")
    for name, known in (("a.csv", "id, body"), ("a.parquet", "id, body"), ("a.txt", "text")):
        inputs = Inputs(files=(str(tmp_path / name),), columns=Columns(text="words"))
        with pytest.raises(InputError, match=rf"{name}: there is no column 'words'.*{known}"):
            inputs.check()
        kept = Inputs(files=(str(tmp_path / name),), columns=Columns(text=known[-4:], keep=("more",)))
        with pytest.raises(InputError, match="no column 'more'"):
            kept.check()


def test_a_column_of_numbers_is_refused_at_once(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})
    with pytest.raises(InputError, match="holds int64, not text"):
        Inputs(files=(str(path),)).check()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "there is no column 'text'; its columns are body"),
        ('{"text": 5}', "column 'text' holds a number, not text"),
        ('{"text": null}', "column 'text' holds null, not text"),
        ('{"text": ["x"]}', "column 'text' holds a list, not text"),
    ],
)
def test_a_json_row_without_text_is_an_error_and_keeps_its_columns(
    line: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line[:-1] + ', "id": 7}\n')
    (record,) = Inputs(files=(str(path),), columns=Columns(keep=("id", "other"))).records()
    assert record.error is not None
    assert record.error.startswith(message)
    assert record.kept == {"id": 7, "other": None}


def test_candidates_are_lists_in_json_and_parquet_and_json_lists_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "c": ["a", "b"]}\n{"text": "x", "c": []}\n')
    (tmp_path / "b.csv").write_text('text,c\nx,"[""a"", ""b""]"\nx,a b\n')
    write_parquet(tmp_path / "c.parquet", {"text": ["x", "x"], "c": [["a", "b"], None]})
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        inputs = Inputs(files=(str(tmp_path / name),), columns=Columns(candidates="c"))
        inputs.check()
        good, bad = inputs.records()
        assert good.candidates == ("a", "b"), name
        assert bad.error is not None, name


def test_a_kept_column_with_the_name_of_a_result_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,spam\n")
    inputs = Inputs(files=(str(path),), columns=Columns(keep=("*",)), reserved=frozenset({"label"}))
    (record,) = inputs.records()
    assert record.kept == {"text": "x", "input_label": "spam"}
    assert inputs.kept_columns() == ["text", "input_label"]


def test_no_kept_column_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,input_label,input_text\nx,spam,ham,y\n")
    inputs = Inputs(files=(str(path),), columns=Columns(keep=("*",)), reserved=frozenset({"label"}))
    (record,) = inputs.records()
    assert record.kept == {"text": "x", "input_label": "spam", "input_input_label": "ham", "input_text": "y"}
    assert inputs.kept_columns() == list(record.kept)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", "files of this kind are not read"),
        ("a.csv", "text\nx\n".encode("utf-16"), "it is UTF-16"),
        ("a.csv", b"text,text\n", "its header names 'text' more than once"),
        ("a.csv", b"", "there is no column 'text'; its columns are none: it is empty"),
        ("a.csv", b'"text\n', "its header is malformed"),
        ("a.parquet", b"text", "it is not a Parquet file"),
    ],
)
def test_an_unusable_file_is_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        Inputs(files=(str(tmp_path / name),)).check()


def test_patterns_are_expanded_in_order_and_no_match_is_an_error(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).touch()
    found = expand_files([tmp_path / "c.csv", str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    assert [Path(name).name for name in found] == ["c.csv", "a.txt", "b.txt"]
    with pytest.raises(InputError, match="no file matches"):
        expand_files([str(tmp_path / "*.jsonl")])
    with pytest.raises(InputError, match="there is no file"):
        expand_files([str(tmp_path / "d.txt")])


def test_a_pattern_does_not_mean_what_is_left_out_and_a_name_does(tmp_path: Path) -> None:
    for name in ("a.csv", "out.csv"):
        (tmp_path / name).touch()
    pattern, out = str(tmp_path / "*.csv"), tmp_path / "." / "out.csv"
    assert [Path(name).name for name in expand_files([pattern], but=[out])] == ["a.csv"]
    assert expand_files([out], but=[out]) == (str(out),)
    with pytest.raises(InputError, match="no file matches"):
        expand_files([str(tmp_path / "o*.csv")], but=[out])


# Blocks


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Four files, small blocks."""
    monkeypatch.setattr(inputs_module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(inputs_module, "BLOCK_CHARACTERS", 50)
    (tmp_path / "a.txt").write_text("\n".join(f"text {i}" for i in range(20)) + "\n\n")
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"row\n{i}"\n' for i in range(11)))
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "{"j" * i}"}}\n' for i in range(30)) + "bad\n")
    write_parquet(tmp_path / "d.parquet", {"text": [f"p {i}" for i in range(9)]}, row_group_size=4)
    return Inputs(files=expand_files([str(tmp_path / "*")]))


def test_blocks_hold_every_record_once_in_order(many: Inputs) -> None:
    blocks = list(many.blocks())
    assert [record for block in blocks for record in block.records] == list(many.records())
    assert len(blocks) > 10
    assert max(len(block.records) for block in blocks) == 7


def test_blocks_begin_and_end_at_the_same_rows_wherever_reading_begins(many: Inputs) -> None:
    blocks = list(many.blocks())
    assert len({record.file for record in many.records()}) == 4
    for index, block in enumerate(blocks):
        assert list(many.blocks(block.end)) == blocks[index + 1 :]


def test_the_share_that_is_read_grows_from_nothing_to_all(many: Inputs) -> None:
    shares = [many.share_read(block.start) for block in many.blocks()]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] <= 1


def test_memory_is_that_of_a_block_whatever_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "word " * 100, "more": "x" * 500}) + "\n"
    path.write_text(line * 30_000)  # 30 MB
    inputs = Inputs(files=(str(path),))
    tracemalloc.start()
    try:
        num_rows = sum(len(block.records) for block in inputs.blocks())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows == 30_000
    assert peak_bytes < 3e6


def test_what_is_carried_along_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "wide.jsonl"
    deep: Any = "x" * 200_000
    for _ in range(150):
        deep = [{"deeper": deep}]
    row = {"text": "short", "long": "y" * 400_000, "deep": deep, "numbers": list(range(1000))}
    path.write_text((json.dumps(row) + "\n") * 20)
    kept = Inputs(files=(str(path),), columns=Columns(keep=("*",)))
    sizes = [len(block.records) for block in kept.blocks()]
    assert sizes == [7, 7, 6]  # 4 Mi characters, the row that exceeds them included
    assert [len(block.records) for block in Inputs(files=(str(path),)).blocks()] == [20]


def test_texts_of_the_command_line_are_rows_without_a_file() -> None:
    found = list(Inputs(texts=("a", "b")).records())
    assert [(record.file, record.row, record.text) for record in found] == [(None, 1, "a"), (None, 2, "b")]
    assert list(Inputs(texts=("a", "b")).records(found[0].end)) == found[1:]


# Standard input


class Stream:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_standard_input_is_read_on_only_if_it_begins_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(files=("-",))
    data = b"one\ntwo\nthree\n"
    monkeypatch.setattr("sys.stdin", Stream(data))
    digest = StreamDigest()
    records = inputs.records(digest=digest)
    first, second = itertools.islice(records, 2)
    assert (first.file, first.where, second.text) == (None, "row 1", "two")
    so_far = digest.hexdigest()
    monkeypatch.setattr("sys.stdin", Stream(data))
    (third,) = inputs.records(second.end, digest=StreamDigest(so_far))
    assert (third.row, third.text) == (3, "three")
    monkeypatch.setattr("sys.stdin", Stream(b"one\ntoo\nthree\n"))
    with pytest.raises(InputError, match="does not begin with the texts"):
        list(inputs.records(second.end, digest=StreamDigest(so_far)))


def test_records_say_where_they_are() -> None:
    assert Record("a.csv", 17, BEGINNING).where == "a.csv, row 17"
