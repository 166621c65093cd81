"""A job writes the same file however often it was killed, and says of every row what became of it."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_architecture, write_checkpoint
from fake_engine import CONTEXT, LABELS, FakeEngine, FakeLLM, number
from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs import inputs as inputs_module
from modernbert_decoder.jobs import parquet_files
from modernbert_decoder.jobs.inputs import Columns, Inputs
from modernbert_decoder.jobs.job import (
    EngineOptions,
    Job,
    Listeners,
    Summary,
    run_to_file,
    sorted_rows,
    stream_rows,
)
from modernbert_decoder.jobs.map_over_files import format_of, map_files
from modernbert_decoder.jobs.resumable import OutputFileError
from modernbert_decoder.jobs.rows import Record
from modernbert_decoder.jobs.tasks import Classify, Embed, Rank, Rerank, ScoreTexts, Task, reserved_names
from modernbert_decoder.jobs.writers import FORMATS

parquet = pytest.importorskip("pyarrow.parquet")

NUM_ROWS = 23
BAD_ROWS = {5: "not valid JSON", 12: "column 'text' holds a number", 20: "tokens"}
TASKS: Mapping[str, Task] = {
    "classify": Classify(),
    "classify all labels": Classify(all_labels=True),
    "score": ScoreTexts(),
    "score tokens": ScoreTexts(tokens=True),
    "embed": Embed(),
    "rank": Rank(candidates=(" a", " b\ud800", " c")),
    "rerank": Rerank(query="dragons"),
    "rerank by classifier": Rerank(query="dragons", by="classifier", label="perhaps"),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_ROWS", 4)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Rows of which three cannot be used: one cannot be read, one has no text, one is too long."""
    lines = [json.dumps({"text": f"text {row}", "id": row}) for row in range(1, NUM_ROWS + 1)]
    lines[4] = '{"text": '
    lines[11] = '{"text": 7, "id": 12}'
    lines[19] = json.dumps({"text": "x" * (CONTEXT + 1), "id": 20})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def job_on(*files: Path, task: Task | None = None, keep: tuple[str, ...] = (), **values: Any) -> Job:
    task = task or Classify()
    inputs = Inputs(files=tuple(map(str, files)), columns=Columns(keep=keep), reserved=reserved_names(task))
    return Job(task=task, inputs=inputs, engine=values.pop("engine", FakeEngine()), **values)


def run(job: Job, output: Path, **options: Any) -> Summary:
    return run_to_file(job, output, format=format_of(output), **options)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; of CSV, with the values that its JSON texts mean."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
        for row in rows:
            if row.get("scores") is not None:
                row["scores"] = dict(row["scores"])
        return rows
    with open(path, newline="") as file:
        return [{name: _meaning(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _meaning(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value or None


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plain(value: Any) -> Any:
    """Numbers to six digits, lone surrogates as files without them show them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.replace("\ud800", "?") if isinstance(value, str) else value


# Results


@pytest.mark.parametrize("name", TASKS)
def test_every_row_has_one_result_and_bad_ones_say_why(name: str, texts: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, str]] = []
    output = tmp_path / "out.jsonl"
    task = TASKS[name]
    summary = run(
        job_on(texts, task=task),
        output,
        listeners=Listeners(on_error=lambda where, message: reports.append((where, message))),
    )
    rows = read(output)
    bad = dict(BAD_ROWS)
    if name == "embed":  # the stand-in embeds any length
        del bad[20]
    assert (summary.num_rows, summary.num_errors, summary.num_computed) == (NUM_ROWS, len(bad), NUM_ROWS)
    in_order = sorted(rows, key=lambda row: row["row"]) if task.is_sorted else rows
    assert [row["row"] for row in in_order] == list(range(1, NUM_ROWS + 1))
    for row in in_order:
        assert set(row) - {"rank"} == {"file", "row", "error", *task.columns}
        assert row["file"] == str(texts)
        if row["row"] in bad:
            assert bad[row["row"]] in row["error"]
            assert all(row[column] is None for column in task.columns)
        else:
            assert row["error"] is None
            assert all(row[column] is not None for column in task.columns)
    assert [where for where, _ in reports] == [f"{texts}, row {row}" for row in bad]


def test_results_are_those_of_the_engine(texts: Path, tmp_path: Path) -> None:
    llm = FakeLLM()
    for name in TASKS:
        output = tmp_path / f"{name}.jsonl"
        run(job_on(texts, task=TASKS[name]), output)
        rows = {row["row"]: row for row in read(output)}
        text = "text 3"
        row = rows[3]
        if name == "classify all labels":
            (expected,) = llm.iter_classify([text])
            assert row["label"] == expected.label
            assert row["scores"] == dict(zip(LABELS.values(), expected.probabilities, strict=True))
            assert row["score"] == max(expected.probabilities)
        elif name == "score tokens":
            (expected,) = llm.iter_score([text])
            assert row["logprob"] == pytest.approx(expected.total_logprob)
            assert row["token_logprobs"] == list(expected.logprobs)
            assert (row["num_tokens"], row["num_bytes"]) == (6, 6)
        elif name == "rank":
            assert [entry["score"] for entry in row["ranking"]] == sorted(
                (-number(text + candidate, 1) for candidate in TASKS[name].candidates), reverse=True
            )
            assert row["best"] == row["ranking"][0]["candidate"]
        elif name == "rerank":
            assert row["score"] == -number(text + "\ndragons", 1)
        elif name == "rerank by classifier":
            (expected,) = llm.iter_classify([("dragons", text)])
            assert row["score"] == expected.probabilities[2]


def test_pairs_are_fed_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b\nx,y\n")
    inputs = Inputs(files=(str(path),), columns=Columns(text="a", pair="b"))
    (row,) = stream_rows(Job(task=Classify(), inputs=inputs, engine=FakeEngine()), Listeners())
    (expected,) = FakeLLM().iter_classify([("x", "y")])
    assert row["score"] == max(expected.probabilities)


@pytest.mark.parametrize("name", TASKS)
def test_csv_parquet_and_the_stream_hold_what_jsonl_holds(name: str, texts: Path, tmp_path: Path) -> None:
    job = job_on(texts, task=TASKS[name], keep=("id",))
    for format in FORMATS:
        run(job, tmp_path / f"out.{format}")
    expected = plain(read(tmp_path / "out.jsonl"))
    assert expected[0].keys() >= {"id", "row", *TASKS[name].columns}
    for others in (
        list(stream_rows(job, Listeners())),
        *(read(tmp_path / f"out.{f}") for f in ("csv", "parquet")),
    ):
        assert plain(others) == expected


def test_columns_that_only_some_rows_have_are_columns_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a", "x": 1}\n{"text": "b", "y": [1], "x": 0.5}\n{"text": "c", "label": true}\n'
    )
    for suffix in ("csv", "parquet"):
        run(job_on(path, keep=("*",)), tmp_path / f"out.{suffix}")
    with open(tmp_path / "out.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == ["file", "row", "text", "x", "y", "input_label", "label", "score", "num_tokens", "error"]
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert schema.names == header
    assert [str(schema.field(name).type) for name in ("x", "y", "input_label")] == [
        "double",
        "string",
        "bool",
    ]


def test_columns_that_utf8_cannot_name_are_columns_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "\\ud800": 1, "\\ud801": 2, "?": 3}\n')
    for suffix in FORMATS:
        run(job_on(path, keep=("*",)), tmp_path / f"out.{suffix}")
    (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert list(row)[:6] == ["file", "row", "text", "??", "???", "?"]
    assert [row[name] for name in ("??", "???", "?")] == [1, 2, 3]
    (as_json,) = read(tmp_path / "out.jsonl")
    assert (as_json["\ud800"], as_json["\ud801"]) == (1, 2)


def test_an_empty_input_gives_an_empty_file_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,id\n")
    for suffix in FORMATS:
        assert run(job_on(path, keep=("id",)), tmp_path / f"out.{suffix}").num_rows == 0
    assert (tmp_path / "out.csv").read_text() == "file,row,id,label,score,num_tokens,error\n"
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0


def test_reranked_rows_come_best_first_ties_in_order_and_bad_ones_last(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in "abcabc") + "bad\n" + '{"text": "d"}\n')
    job = job_on(path, task=Rerank(query="q"), keep=("text",))
    run(job, tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, None]
    assert [row["row"] for row in rows][-1] == 7
    keys = [(-row["score"], row["row"]) for row in rows[:-1]]
    assert keys == sorted(keys)
    best = job_on(path, task=Rerank(query="q"), keep=("text",), top=3)
    run(best, tmp_path / "best.jsonl")
    assert read(tmp_path / "best.jsonl") == list(stream_rows(best, Listeners())) == rows[:3]


def test_a_classifier_without_the_label_is_refused(texts: Path, tmp_path: Path) -> None:
    for label, message in (("maybe", "label is 'maybe'"), (None, "label is missing")):
        task = Rerank(query="q", by="classifier", label=label)
        with pytest.raises(InputError, match=f"^{message}.*no, yes, perhaps"):
            run(job_on(texts, task=task), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "likelyhood"}, "by is 'likelyhood'; choose one of likelihood, classifier"),
        ({"label": "yes"}, "label does not go with by='likelihood'"),
        ({"truncate": True}, "truncate does not go with by='likelihood'"),
        ({"max_length": 9}, "max_length does not go with by='likelihood'"),
        ({"by": "classifier", "separator": " "}, "separator does not go with by='classifier'"),
    ],
)
def test_reranking_refuses_what_it_would_not_look_at(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Rerank(query="q", **options)


def test_the_engine_is_fed_one_block_at_a_time(texts: Path) -> None:
    """So that results come while the rest of the file is not even read."""
    sizes: list[int] = []

    class Watched(Classify):
        def results(self, llm: Any, records: Iterable[Record]) -> Iterator[Any]:
            records = list(records)
            sizes.append(len(records))
            return super().results(llm, records)

    rows = stream_rows(job_on(texts, task=Watched()), Listeners())
    next(rows)
    assert sizes == [4]
    rows.close()


def test_strict_ends_at_the_first_bad_row_and_names_it(texts: Path, tmp_path: Path) -> None:
    strict = Listeners(strict=True)
    with pytest.raises(InputError, match=r"texts\.jsonl, row 5: not valid JSON"):
        run(job_on(texts), tmp_path / "out.jsonl", listeners=strict)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match="row 5"):
        list(stream_rows(job_on(texts), strict))
    summary = run(job_on(texts), tmp_path / "out.jsonl")  # what was written before it still counts
    assert (summary.num_rows, summary.num_computed) == (NUM_ROWS, NUM_ROWS - 4)


def test_parquet_without_pyarrow_says_what_to_install(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(parquet_files.MissingExtraError, match=r"modernbert-decoder\[data\]"):
        run(job_on(texts), tmp_path / "out.parquet")
    assert names_of(tmp_path) == ["texts.jsonl"]  # told before anything is computed


# Being killed

# Forks a run that kills itself at the n-th of the calls that touch files, for every n, and continues it.
KILLED_EVERYWHERE = """
import io, json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, sys.argv[1])
import pyarrow.parquet
pyarrow.array(["imports what else there is, before the forks"])
from fake_engine import FakeEngine
from modernbert_decoder.jobs import inputs as inputs_module
from modernbert_decoder.jobs.inputs import Columns, Inputs
from modernbert_decoder.jobs.job import Job, run_to_file
from modernbert_decoder.jobs.tasks import Classify, Rerank, reserved_names

inputs_module.BLOCK_ROWS = 9
CALLS = {"open", "write", "writelines", "flush", "fsync", "replace", "truncate", "unlink", "write_table"}

def run(folder, kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def hook(frame, event, called):
        nonlocal count
        if event in ("c_call", "c_return") and called.__name__ in CALLS:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if source == "-":
        sys.stdin = SimpleNamespace(buffer=io.BytesIO(texts.read_bytes() + b"\\n  \\n\\n"))
    sys.setprofile(hook)
    run_to_file(job, folder / name, format=format)
    os._exit(0)

texts, work, step = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[7])
format, task_name, source = sys.argv[4], sys.argv[5], sys.argv[8]
task = {"classify": Classify(), "rerank": Rerank(query="q")}[task_name]
files, keep = (("-",), ("text",)) if source == "-" else ((str(texts),), ("id",))
inputs = Inputs(files=files, columns=Columns(keep=keep), reserved=reserved_names(task))
job = Job(task=task, inputs=inputs, engine=FakeEngine())
name = f"out.{format}"
assert run(work, None) == 0
expected = (work / name).read_bytes()
kill_at, num_killed = int(sys.argv[6]) - step, 0
status = -1
while status != 0:
    kill_at += step
    folder = work / str(kill_at)
    folder.mkdir()
    status = run(folder, kill_at)
    num_killed += status == signal.SIGKILL
    assert status in (0, signal.SIGKILL), status
    # Killed a second time, at another place, then left alone.
    assert run(folder, 1 + kill_at * 7 % 40) in (0, signal.SIGKILL)
    assert run(folder, None) == 0
    assert (folder / name).read_bytes() == expected, kill_at
    names = sorted(path.name for path in folder.iterdir())
    assert names == [name, name + ".job.json"], (kill_at, names)
print(num_killed, len(expected))
"""


@pytest.mark.parametrize(
    ("format", "task", "places", "source"),
    # Parquet's library takes its time in every process; what precedes the last steps is the same for all.
    [
        ("jsonl", "classify", (1, 1), "file"),
        ("csv", "rerank", (40, 3), "file"),
        ("parquet", "classify", (60, 7), "file"),
        ("csv", "classify", (40, 3), "-"),
    ],
)
def test_a_job_killed_at_any_place_is_continued_to_the_same_bytes(
    format: str, task: str, places: tuple[int, int], source: str, texts: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    script = [sys.executable, "-c", KILLED_EVERYWHERE, str(Path(__file__).parent), str(texts), str(work)]
    script += [format, task, *map(str, places), source]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    num_killed, num_bytes = map(int, done.stdout.split())
    first, step = places
    assert first + num_killed * step > 80
    assert num_bytes > 500


class InterruptedRunError(Exception):
    """Stands for whatever ends a process."""


def interrupt_after(job: Job, output: Path, num_blocks: int) -> None:
    """Leaves a job when so many blocks are written."""
    count = 0

    def on_rows(num_rows: int, share: float | None) -> None:
        nonlocal count
        count += 1
        if count == num_blocks + 1:  # the first call is about rows that were there before
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run(job, output, listeners=Listeners(on_rows=on_rows))


def test_nothing_that_is_written_is_computed_again(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    interrupt_after(job_on(texts), output, 2)
    interrupt_after(job_on(texts), output, 1)
    assert not output.exists()
    summary = run(job_on(texts), output)
    assert (summary.num_rows, summary.num_computed, summary.num_errors) == (NUM_ROWS, NUM_ROWS - 12, 3)


def test_a_torn_last_line_is_cut_off(texts: Path, tmp_path: Path) -> None:
    run(job_on(texts), tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    interrupt_after(job_on(texts), output, 2)
    with open(tmp_path / "out.jsonl.partial", "ab") as partial:
        partial.write(b'{"file": "texts.jsonl", "ro')
    run(job_on(texts), output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_completed_job_is_not_done_again(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    run(job_on(texts), output)
    before = output.stat()
    monkeypatch.setattr(FakeEngine, "open", lambda self: pytest.fail("the model was loaded"))
    summary = run(job_on(texts), output)
    assert (summary.num_rows, summary.num_errors, summary.num_computed) == (NUM_ROWS, 3, 0)
    assert output.stat() == before
    assert names_of(tmp_path) == ["out.jsonl", "out.jsonl.job.json", "texts.jsonl"]


def test_another_job_does_not_continue_it(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    interrupt_after(job_on(texts), output, 1)
    partial = (tmp_path / "out.jsonl.partial").read_bytes()
    others = {
        "options": job_on(texts, task=Classify(truncate=True)),
        "inputs": job_on(texts, keep=("id",)),
        "model": job_on(texts, engine=FakeEngine(model="another")),
    }
    for what, job in others.items():
        with pytest.raises(InputError, match=f"a job with other {what};.*--overwrite"):
            run(job, output)
    with pytest.raises(InputError, match="other model and options;"):
        run(job_on(texts, task=ScoreTexts(), engine=FakeEngine(model="another")), output)
    os.utime(texts, ns=(1, 1))
    with pytest.raises(InputError, match="other inputs"):
        run(job_on(texts), output)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == partial
    assert run(job_on(texts), output, overwrite=True).num_computed == NUM_ROWS


def test_overwrite_replaces_a_completed_job_and_continues_an_unfinished_one(
    texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run(job_on(texts, task=ScoreTexts()), output)
    old = output.read_bytes()
    assert run(job_on(texts, task=ScoreTexts()), output, overwrite=True).num_computed == NUM_ROWS
    count = 0

    def on_rows(num_rows: int, share: float | None) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run(job_on(texts), output, overwrite=True, listeners=Listeners(on_rows=on_rows))
    assert output.read_bytes() == old  # until the new one is complete
    assert run(job_on(texts), output, overwrite=True).num_computed == NUM_ROWS - 8


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", "out.jsonl.job.json"])
def test_a_file_of_unknown_origin_is_not_replaced_unasked(name: str, texts: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious\n")
    with pytest.raises(InputError, match="--overwrite"):
        run(job_on(texts), tmp_path / "out.jsonl")
    assert (tmp_path / name).read_text() == "precious\n"
    assert names_of(tmp_path) == sorted([name, "texts.jsonl"])
    run(job_on(texts), tmp_path / "out.jsonl", overwrite=True)
    assert len(read(tmp_path / "out.jsonl")) == NUM_ROWS


def test_lost_results_are_noticed(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    interrupt_after(job_on(texts), output, 2)
    os.truncate(tmp_path / "out.jsonl.partial", 10)
    with pytest.raises(InputError, match=r"out\.jsonl\.partial is shorter than"):
        run(job_on(texts), output)
    run(job_on(texts), output, overwrite=True)
    output.unlink()
    with pytest.raises(InputError, match="was completed and is gone"):
        run(job_on(texts), output)


def test_two_processes_do_not_write_the_same_file(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "out.jsonl"

    def on_rows(num_rows: int, share: float | None) -> None:
        with pytest.raises(InputError, match="another process is writing"):
            run(job_on(texts), output)

    assert run(job_on(texts), output, listeners=Listeners(on_rows=on_rows)).num_rows == NUM_ROWS
    assert len(read(output)) == NUM_ROWS


def test_an_input_is_not_overwritten_by_its_results(texts: Path) -> None:
    with pytest.raises(InputError, match="is one of the inputs"):
        run(job_on(texts), texts, overwrite=True)


@pytest.mark.parametrize("pattern", ["*.jsonl", "*"])
def test_a_pattern_that_means_inputs_and_results_is_continued_and_done_once(
    pattern: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"

    def mapped() -> Summary:
        return map_files(Classify(), [tmp_path / pattern], output, model=FakeEngine())

    with monkeypatch.context() as patch:
        patch.setattr(inputs_module.Inputs, "share_read", lambda *_: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            mapped()
    assert (tmp_path / "out.jsonl.partial").exists()
    assert mapped().num_computed == NUM_ROWS
    before = output.read_bytes()
    assert (mapped().num_rows, mapped().num_computed) == (NUM_ROWS, 0)
    # Killed between the renaming of the file and the journal's word of it.
    journal = tmp_path / "out.jsonl.job.json"
    assert '"state": "complete"' in journal.read_text()
    journal.write_text(journal.read_text().replace('"complete"', '"finishing"'))
    assert mapped().num_computed == 0
    assert output.read_bytes() == before
    assert '"state": "complete"' in journal.read_text()


def test_a_file_of_ones_own_that_a_pattern_means_is_not_taken_for_results(
    texts: Path, tmp_path: Path
) -> None:
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is one of the inputs"):
            map_files(Classify(), [tmp_path / "*"], texts, model=FakeEngine(), overwrite=overwrite)


def test_a_full_disk_is_told_and_the_job_continued(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job_on(texts), tmp_path / "whole.csv")
    output = tmp_path / "out.csv"
    num_calls = 0
    sync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputFileError, match=r"out\.csv: No space left.*same command continues"):
            run(job_on(texts), output)
    assert run(job_on(texts), output).num_computed < NUM_ROWS
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


# Standard input

LINES = "".join(f"text {row}\n" for row in range(NUM_ROWS)).encode()


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input."""

    class Stream:
        buffer = io.BytesIO()

    def put(data: bytes) -> None:
        Stream.buffer = io.BytesIO(data)
        monkeypatch.setattr("sys.stdin", Stream)

    return put


def test_standard_input_is_continued_if_it_begins_as_before(
    tmp_path: Path, give: Callable[[bytes], None]
) -> None:
    job, output = job_on(Path("-")), tmp_path / "out.jsonl"
    give(LINES)
    interrupt_after(job, output, 2)
    give(b"other" + LINES)
    with pytest.raises(InputError, match="does not begin with the texts"):
        run(job, output)
    give(LINES)
    assert run(job, output).num_computed == NUM_ROWS - 8
    assert [row["row"] for row in read(output)] == list(range(1, NUM_ROWS + 1))


def test_blank_lines_at_the_end_of_standard_input_do_not_cost_the_results(
    tmp_path: Path, give: Callable[[bytes], None]
) -> None:
    job, output = job_on(Path("-")), tmp_path / "out.jsonl"
    give(LINES + b"\n \n")
    interrupt_after(job, output, 6)  # all blocks are written, the file is not finished
    give(LINES + b"\n \n")
    summary = run(job, output)
    assert (summary.num_rows, summary.num_computed) == (NUM_ROWS, 0)


@pytest.mark.parametrize("end", [b"", b"\n\n"])
def test_a_completed_job_on_standard_input_does_not_answer_for_other_texts(
    end: bytes, tmp_path: Path, give: Callable[[bytes], None]
) -> None:
    job, output = job_on(Path("-")), tmp_path / "out.csv"
    give(LINES + end)
    run(job, output)
    before = output.read_bytes()
    for other in (b"", b"other\n", LINES + b"one more\n", LINES.replace(b"text 22", b"text 23")):
        give(other)
        with pytest.raises(InputError, match=r"out\.csv holds the results of other texts.*--overwrite"):
            run(job, output)
    assert output.read_bytes() == before
    give(LINES + end)
    assert run(job, output).num_computed == 0
    give(b"other\n")
    assert run(job, output, overwrite=True).num_rows == 1


def test_overwriting_an_unfinished_job_on_standard_input_takes_the_new_texts(
    tmp_path: Path, give: Callable[[bytes], None]
) -> None:
    job, output = job_on(Path("-")), tmp_path / "out.csv"
    give(LINES)
    interrupt_after(job, output, 2)
    give(b"other\n")
    summary = run(job, output, overwrite=True)
    assert (summary.num_rows, summary.num_computed) == (1, 1)


def test_standard_input_is_compared_even_if_a_later_file_is_reached(
    tmp_path: Path, give: Callable[[bytes], None]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(LINES)
    job, output = job_on(Path("-"), path), tmp_path / "out.jsonl"
    for data in (b"", b"one\ntwo\n\n"):
        give(data)
        interrupt_after(job, output, 2)
        give(b"other\n")
        with pytest.raises(InputError, match="does not begin with the texts"):
            run(job, output)
        give(data)
        assert run(job, output).num_computed == NUM_ROWS + len(data.split()) - 8
        for leftover in tmp_path.glob("out.*"):
            leftover.unlink()


# What tells jobs apart, and what they cost


def test_another_tokenizer_of_the_same_size_is_another_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_architecture())
    engine = EngineOptions(model=str(folder))
    before = engine.identity()
    assert engine.identity() == before
    tokenizer = folder / "tokenizer.json"
    data = tokenizer.read_bytes()
    tokenizer.write_bytes(data.swapcase())
    assert len(data.swapcase()) == len(data)
    after = engine.identity()
    assert after != before
    (folder / "tokenizer_config.json").write_text('{"cls_token": "[CLS]"}')
    assert engine.identity() not in (before, after)


def test_white_space_at_the_end_of_a_document_does_not_change_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ends = ("", " ", "\n\n", "\t \r\n")
    path.write_text("".join(json.dumps({"text": "a king" + end}) + "\n" for end in ends))
    scores = {row["score"] for row in stream_rows(job_on(path, task=Rerank(query="q")), Listeners())}
    assert scores == {-number("a king\nq", 1)}


def test_sorting_holds_some_thirty_bytes_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    num_rows = 40_000
    path.write_text("".join(f'{{"score": {row * 7919 % num_rows}.5}}\n' for row in range(num_rows)))
    tracemalloc.start()
    try:
        best = next(sorted_rows(path, None))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert best == {"rank": 1, "score": num_rows - 0.5}
    assert peak_bytes / num_rows < 45


def test_map_files_takes_patterns_and_says_how_it_went(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "out.parquet"
    summary = map_files(
        Classify(),
        [tmp_path / "*.jsonl"],
        output,
        model=FakeEngine(),
        columns=Columns(keep=("id",)),
    )
    assert (summary.num_rows, summary.num_errors) == (NUM_ROWS, 3)
    assert [row["id"] for row in read(output)] == [
        None if row == 5 else row for row in range(1, NUM_ROWS + 1)
    ]
    with pytest.raises(InputError, match="none of the suffixes"):
        map_files(Classify(), [texts], tmp_path / "out.txt", model=FakeEngine())
    with pytest.raises(InputError, match="there are no files"):
        map_files(Classify(), [], output, model=FakeEngine())
