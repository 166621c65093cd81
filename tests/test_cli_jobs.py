"""`mbd classify`, `score`, `embed` and `rank`: from every kind of input to every kind of output."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import tiny_architecture, write_checkpoint
from hostile_texts import HOSTILE
from modernbert_decoder.architecture import Head
from modernbert_decoder.cli import main
from modernbert_decoder.cli.job_command import EXIT_ROWS_FAILED
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.jobs.inputs import SUFFIXES

MBD = (sys.executable, "-m", "modernbert_decoder.cli")
TEXTS = ("Once upon a time there was a king.", "The old queen", "Café 😀")
LABELS = {0: "no", 1: "yes", 2: "perhaps"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MBD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MBD_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random classifier with a context of 128 bytes."""
    architecture = tiny_architecture(
        head=Head.SEQUENCE_CLASSIFICATION, id2label=LABELS, max_position_embeddings=128
    )
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "classifier", architecture))


def run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What `mbd` prints to standard output and standard error, in this process."""
    assert main(arguments) == code, capfd.readouterr()
    captured = capfd.readouterr()
    return captured.out, captured.err


def rows(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    out, _ = run(capfd, *arguments, "--format", "jsonl", code=code)
    return [json.loads(line) for line in out.splitlines()]


def process(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*MBD, *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=120,
        check=False,
    )


# What is computed


def test_classify_gives_what_the_engine_gives(classifier: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = rows(capfd, "classify", "-m", classifier, "--all-labels", *TEXTS)
    with LLM(classifier) as llm:
        expected = llm.classify(list(TEXTS))
    for row, output in zip(found, expected, strict=True):
        assert row["label"] == output.label
        assert list(row["scores"]) == list(LABELS.values())
        assert list(row["scores"].values()) == pytest.approx(output.probabilities, rel=1e-5)
        assert row["score"] == max(row["scores"].values())
        assert row["num_tokens"] == output.num_tokens
        assert row["error"] is None


def test_classify_reads_pairs_of_columns_and_carries_columns_along(
    classifier: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("pairs.csv").write_text("a,b,label\nfirst,second,yes\nfirst,third,no\n")
    arguments = ("-i", "pairs.csv", "--column", "a", "--pair-column", "b", "--keep", "label", "--keep", "b")
    found = rows(capfd, "classify", "-m", classifier, *arguments)
    with LLM(classifier) as llm:
        expected = llm.classify([("first", "second"), ("first", "third")])
    assert [row["label"] for row in found] == [output.label for output in expected]
    assert [row["score"] for row in found] == pytest.approx(
        [max(output.probabilities) for output in expected], rel=1e-5
    )
    assert [(row["file"], row["row"], row["input_label"], row["b"]) for row in found] == [
        ("pairs.csv", 1, "yes", "second"),
        ("pairs.csv", 2, "no", "third"),
    ]


def test_a_long_text_is_an_error_of_its_row_unless_it_may_be_cut(
    classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ("short", "long " * 50)
    _, error = rows(capfd, "classify", "-m", classifier, *texts, code=EXIT_ROWS_FAILED)
    assert error["label"] is None
    assert "252 tokens and at most 128" in error["error"]  # [CLS], 250 bytes, [SEP]
    cut = rows(capfd, "classify", "-m", classifier, "--truncate", "--max-length", "20", *texts)
    assert [row["num_tokens"] for row in cut] == [7, 20]


def test_score_gives_what_the_engine_gives_and_long_texts_take_a_stride(
    capfd: pytest.CaptureFixture[str],
) -> None:
    texts = (*TEXTS, "word " * 300)
    options = ("score", "--max-context", "128", "--tokens", *texts)
    assert rows(capfd, *options, code=EXIT_ROWS_FAILED)[3]["error"] is not None
    found = rows(capfd, *options, "--stride", "50")
    with LLM("storyteller", max_context=128) as llm:
        expected = llm.score(list(texts), stride=50)
    for row, score in zip(found, expected, strict=True):
        assert row["logprob"] == pytest.approx(score.total_logprob, rel=1e-3)
        assert row["perplexity"] == pytest.approx(score.perplexity, rel=1e-3)
        assert row["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-3)
        assert row["token_ids"] == list(score.token_ids[1:])
        assert len(row["token_logprobs"]) == row["num_tokens"]


def test_embed_gives_what_the_engine_gives(capfd: pytest.CaptureFixture[str]) -> None:
    options = {"pooling": "mean", "normalize": False}
    arguments = ("--pooling", "mean", "--no-normalize", "--dtype", "float32")
    found = np.array([row["embedding"] for row in rows(capfd, "embed", *arguments, *TEXTS)])
    with LLM("storyteller", dtype="float32") as llm:
        expected = llm.embed(list(TEXTS), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rank_puts_the_likeliest_candidate_first(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--candidate", " banana", "--candidate", " time", "--normalization", "byte")
    (row,) = rows(capfd, "rank", *arguments, "Once upon a")
    assert row["best"] == " time"
    assert [entry["index"] for entry in row["ranking"]] == [1, 0]
    with LLM("storyteller") as llm:
        expected = llm.rank("Once upon a", [" banana", " time"], normalization="byte")
    assert [entry["score"] for entry in row["ranking"]] == pytest.approx(
        [e.score for e in expected], rel=1e-3
    )


def test_rank_takes_each_rows_own_candidates(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text(
        '{"text": "Once upon a", "c": [" time", " hill"]}\n{"text": "x"}\n{"text": "The", "c": [" king"]}\n'
    )
    found = rows(capfd, "rank", "-i", "a.jsonl", "--candidates-column", "c", code=EXIT_ROWS_FAILED)
    assert [row["best"] for row in found] == [" time", None, " king"]
    assert "list of one or more texts" in found[1]["error"]


def test_a_query_sorts_documents_by_likelihood_or_by_a_classifier(
    classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("stories.csv").write_text(
        "title,text\nA,The dragon flew over the sea.\nB,The price of corn\nC,A cat\n"
    )
    arguments = ("-i", "stories.csv", "--keep", "title")
    found = rows(capfd, "rank", "--query", "The dragon flew", *arguments)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert found[0]["title"] == "A"
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    by = ("--by", "classifier", "--label", "perhaps", "-m", classifier, "--top", "2")
    best = rows(capfd, "rank", "--query", "dragon", *arguments, *by)
    with LLM(classifier) as llm:
        outputs = llm.classify(
            [
                ("dragon", "The dragon flew over the sea."),
                ("dragon", "The price of corn"),
                ("dragon", "A cat"),
            ]
        )
    expected = sorted((output.probabilities[2] for output in outputs), reverse=True)[:2]
    assert [row["score"] for row in best] == pytest.approx(expected, rel=1e-5)


# Inputs and outputs


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_an_output_without_a_name_is_refused(output: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("The fox ran.\n", encoding="utf-8")
    for options in ([], ["--format", "csv"]):
        _, error = run(capfd, "score", "-i", "a.txt", "-o", output, *options, code=2)
        assert "is a folder; give the name of a file to write" in error


def test_every_kind_of_input_gives_the_same_results(capfd: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    with open("a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "body"], *enumerate(TEXTS)])
    Path("a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    parquet.write_table(pyarrow.table({"body": TEXTS}), "a.parquet")
    expected = [row["logprob"] for row in rows(capfd, "score", *TEXTS)]
    assert [row["logprob"] for row in rows(capfd, "score", "-i", "a.txt")] == expected
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        found = rows(capfd, "score", "-i", name, "--column", "body")
        assert [row["logprob"] for row in found] == expected
        assert [row["file"] for row in found] == [name] * 3
    done = process("score", "--format", "jsonl", stdin="\n".join(TEXTS).encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert [json.loads(line)["logprob"] for line in done.stdout.splitlines()] == expected


def test_patterns_and_whole_files(capfd: pytest.CaptureFixture[str]) -> None:
    for name in "ba":
        Path(f"{name}.txt").write_text(f"{name}\n\nsecond line\n")
    found = rows(capfd, "score", "-i", "*.txt")
    assert [(row["file"], row["row"]) for row in found] == [
        ("a.txt", 1),
        ("a.txt", 3),
        ("b.txt", 1),
        ("b.txt", 3),
    ]
    whole = rows(capfd, "score", "-i", "*.txt", "--whole-files")
    assert [(row["file"], row["num_bytes"]) for row in whole] == [("a.txt", 15), ("b.txt", 15)]


def test_files_hold_what_the_stream_shows(capfd: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    arguments = ("score", "-i", "a.txt", "--keep", "text")
    expected = rows(capfd, *arguments)
    for suffix in ("jsonl", "csv", "parquet"):
        out, err = run(capfd, *arguments, "-o", f"out.{suffix}")
        assert out.startswith(f"out.{suffix}: 3 rows, in ")
        assert err == ""
        again, _ = run(capfd, *arguments, "-o", f"out.{suffix}")
        assert again == f"out.{suffix}: 3 rows, all of them there already\n"
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == expected
    assert parquet.read_table("out.parquet").to_pylist() == expected
    with open("out.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [float(row["logprob"]) for row in found] == [row["logprob"] for row in expected]
    shown, _ = run(capfd, *arguments, "--format", "csv")
    assert shown == Path("out.csv").read_text(encoding="utf-8")
    assert run(capfd, *arguments, "--quiet", "-o", "quiet.csv") == ("", "")


def test_the_table_is_for_reading(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "' + "word " * 40 + '"}\n{"text": "two\\nlines\\u001b[1m"}\n[]\n')
    out, err = run(capfd, "score", "-i", "a.jsonl", code=EXIT_ROWS_FAILED)
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["file", "row", "text"]
    assert len(lines) == 4
    assert "word word" in lines[1]
    assert "…" in lines[1]
    assert "two lines?[1m" in lines[2]
    assert lines[3].endswith("error: not a JSON object but a list")
    assert err.splitlines() == [
        "mbd: a.jsonl, row 3: not a JSON object but a list",
        "mbd: 1 row could not be used; column `error` of the results says why",
    ]


def test_data_is_utf8_whatever_the_terminal(tmp_path: Path) -> None:
    Path("a.txt").write_text("Café 😀\n", encoding="utf-8")
    done = process(
        *("score", "-i", "a.txt", "--keep", "text", "--format", "csv"),
        environment={"PYTHONIOENCODING": "ascii"},
    )
    (row,) = csv.DictReader(io.StringIO(done.stdout.decode("utf-8")))
    assert row["text"] == "Café 😀"


def test_a_terminal_gets_a_bar_with_rows_per_second_and_others_none() -> None:
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    Path("a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with open(terminal, "rb", buffering=0) as screen:
        command = [*MBD, "score", "-i", "a.txt", "-o", "out.csv"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end) as running:
            assert running.stdout is not None
            out = running.stdout.read()
        os.close(end)
        shown = screen.read(10_000)
    assert running.returncode == 0
    assert out.startswith(b"out.csv: 3 rows")
    assert b"\rscore" in shown
    assert b"rows/s" in shown


def test_a_pattern_that_means_the_results_too_is_the_same_job_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("a.csv").write_text("text\nx\ny\n")
    arguments = ("score", "-i", "*.csv", "-o", "out.csv")
    assert run(capfd, *arguments)[0].startswith("out.csv: 2 rows, in ")
    assert run(capfd, *arguments)[0] == "out.csv: 2 rows, all of them there already\n"


def tables(classifier: str) -> dict[str, tuple[list[str], list[str]]]:
    """Command -> arguments, and what its table is headed with."""
    two = ["--candidate", " a", "--candidate", " b"]
    return {
        "classify": (
            ["-m", classifier, "--all-labels"],
            ["row", "text", "label", "score", "scores", "num_tokens"],
        ),
        "embed": ([], ["row", "text", "embedding", "num_tokens"]),
        "rank": (two, ["row", "text", "best", "score", "ranking"]),
        "rank by a query": (["--query", "king"], ["rank", "row", "text", "score"]),
    }


@pytest.mark.parametrize("name", ["classify", "embed", "rank", "rank by a query"])
def test_every_command_shows_a_table(name: str, classifier: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, header = tables(classifier)[name]
    out, err = run(capfd, name.split(maxsplit=1)[0], *arguments, *TEXTS)
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == header
    assert len(lines) == 1 + len(TEXTS)
    shown = {
        "classify": lambda line: all(label in line for label in LABELS.values()),
        "embed": lambda line: " more]" in line,
        "rank": lambda line: {"a", "b"} <= {word.strip(",") for word in line.split()},
        "rank by a query": lambda line: line.split()[0] in "123",
    }[name]
    assert all(map(shown, lines[1:]))


def test_kept_lists_and_objects_are_shown_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "a", "x": [{"candidate": "c"}], "y": [], "z": {}}\n')
    arguments = [argument for name in "xyz" for argument in ("--keep", name)]
    out, _ = run(capfd, "score", "-i", "a.jsonl", *arguments)
    assert out.splitlines()[1].split()[:5] == ["a.jsonl", "1", "[candidate", "c]", "[]"]
    assert " {} " in out


# Texts nobody expects


def commands(classifier: str) -> dict[str, list[str]]:
    return {
        "classify": ["-m", classifier],
        "score": [],
        "embed": [],
        "rank": ["--candidates-column", "c"],
    }


@pytest.mark.parametrize("name", ["classify", "score", "embed", "rank"])
def test_hostile_texts_pass_from_files_to_files_of_every_format(
    name: str, classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [json.dumps({"text": text, "c": [text + "b", "a"]}) for text in HOSTILE.values()]
    Path("a.jsonl").write_text("\n".join(lines) + "\n")
    arguments = (name, *commands(classifier)[name], "-i", "a.jsonl", "--keep", "text", "--quiet")
    for suffix in ("jsonl", "csv", "parquet"):
        assert run(capfd, *arguments, "-o", f"out.{suffix}") == ("", "")
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == list(HOSTILE.values())
    assert [row["error"] for row in found] == [None] * len(HOSTILE)
    stored = [text.encode("utf-8", "replace").decode() for text in HOSTILE.values()]
    for rows_of_file in (
        list(csv.DictReader(io.StringIO(Path("out.csv").read_bytes().decode(), newline=""))),
        parquet.read_table("out.parquet").to_pylist(),
    ):
        assert [row["text"] for row in rows_of_file] == stored
        assert not any(row["error"] for row in rows_of_file)


@pytest.mark.parametrize("name", ["classify", "score", "embed", "rank"])
def test_an_empty_text_is_a_text_but_for_score(
    name: str, classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a.jsonl").write_text('{"text": "", "c": ["a", "b"]}\n{"text": "x", "c": ["a"]}\n')
    arguments = (name, *commands(classifier)[name], "-i", "a.jsonl")
    empty, other = rows(capfd, *arguments, code=EXIT_ROWS_FAILED if name == "score" else 0)
    assert other["error"] is None
    if name == "score":
        assert "text is empty" in empty["error"]
        (argument,) = rows(capfd, "score", "", code=EXIT_ROWS_FAILED)
        assert "text is empty" in argument["error"]
    else:
        assert empty["error"] is None


def test_no_text_at_all_is_no_error() -> None:
    done = process("score")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) == 1  # the header
    assert process("score", "--format", "jsonl").stdout == b""


# Failing


def test_strict_stops_at_the_first_bad_row(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\nbad\n{"text": "b"}\n')
    out, err = run(capfd, "score", "-i", "a.jsonl", "--strict", "--format", "jsonl", code=2)
    assert err.startswith("mbd: error: a.jsonl, row 2: not valid JSON")
    assert [json.loads(line)["row"] for line in out.splitlines()] == [1]
    assert len(rows(capfd, "score", "-i", "a.jsonl", code=EXIT_ROWS_FAILED)) == 3


def test_many_bad_rows_are_counted_but_not_all_listed(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text("bad\n" * 250)
    out, err = run(capfd, "score", "-i", "a.jsonl", "-o", "out.csv", code=EXIT_ROWS_FAILED)
    assert "250 rows" in out
    assert err.count("not valid JSON") == 100
    assert "mbd: 250 rows could not be used, 150 of them not listed here" in err
    with open("out.csv", newline="") as file:
        assert [row["row"] for row in csv.DictReader(file)] == [str(row) for row in range(1, 251)]


ARGUMENTS = [
    (("score", "a.csv"), "a.csv is a file, but arguments are texts"),
    (("score", "-i", "b.csv"), "there is no file b.csv"),
    (("score", "-i", "*.jsonl"), "no file matches *.jsonl"),
    (("score", "-i", "a.csv", "text"), "exclude each other"),
    (("score", "-i", "a.csv", "--column", "body"), "there is no column 'body'; its columns are text, id"),
    (("score", "-i", "a.csv", "--keep", "body"), "there is no column 'body'"),
    (("score", "-i", "a.csv", "-o", "out.json"), "none of the suffixes"),
    (("score", "-i", "a.csv", "-o", "a.csv"), "is one of the inputs"),
    (("score", "-i", "a.csv", "-o", "out.csv", "--format", "table"), "a table is for reading"),
    (("score", "-i", "a.csv", "--format", "parquet"), "add --output FILE"),
    (("score", "-i", "a.csv", "--overwrite"), "--overwrite needs a file"),
    (("score", "-i", "a.csv", "--ray"), "--ray needs a file"),
    (("score", "-i", "a.csv", "--workers", "2", "-o", "out.csv"), "add --ray"),
    (("score", "--ray", "a text"), "'a text' is no address"),
    (("score", "--stride", "0", "text"), "--stride"),
    (("score", "--column", "body", "text"), "have no columns"),
    (("score", "-i", "-", "--column", "body"), "standard input has lines"),
    (("score", "-i", "-", "--keep", "id"), "standard input has lines"),
    (("score", "--keep", "id", "text"), "have no columns"),
    (("score", "-i", "-", "--whole-files"), "standard input is read line by line"),
    (("score", "-i", "a.csv", "--whole-files"), "--whole-files is for .txt files"),
    (("score", "--whole-files", "text"), "--whole-files is for .txt files"),
    (("embed", "--pooling", "max", "text"), "--pooling"),
    (("classify", "text"), "Missing option '--model'"),
    (("classify", "-m", "storyteller", "text"), "cannot classify"),
    (("rank", "text"), "give one of --candidate"),
    (("rank", "--query", "q", "--candidate", "c", "text"), "give one of --candidate"),
    (("rank", "--query", "", "--candidate", "c", "text"), "give one of --candidate"),
    (("rank", "--query", " ", "text"), "--query is empty"),
    (("rank", "--candidate", "", "text"), "a --candidate is empty"),
    (("rank", "--query", "q", "--normalization", "sum", "text"), "--normalization does not go with --query"),
    (("rank", "--candidate", "c", "--top", "3", "text"), "--top does not go with candidates"),
    (("rank", "--query", "q", "--label", "l", "text"), "--label does not go with --by likelihood"),
    (
        ("rank", "--query", "q", "--by", "classifier", "--separator", " ", "text"),
        "--separator does not go with --by classifier",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=lambda value: " ".join(value)[:50])
def test_a_wrong_argument_is_explained(
    arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a.csv").write_text("text,id\nx,1\n")
    out, err = run(capfd, *arguments, code=2)
    assert out == ""
    assert err.startswith("mbd: error: ")
    assert words in err
    assert len(err.splitlines()) <= 4
    assert sorted(path.name for path in Path().iterdir()) == ["a.csv"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_name_of_a_file_is_not_taken_for_a_text(suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"a{suffix}"
    Path(name).touch()
    _, err = run(capfd, "score", name, code=2)
    assert f"{name} is a file, but arguments are texts" in err


# Ray


def test_ray_is_started_and_stopped_by_the_command(
    classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    lines = [*TEXTS, *(f"row {row}" for row in range(4097))]  # three blocks: there is work for two
    Path("a.txt").write_text("\n".join(lines), encoding="utf-8")
    arguments = ("classify", "-m", classifier, "-i", "a.txt", "--threads", "1", "--all-labels")
    run(capfd, *arguments, "-o", "alone.csv")
    done = process(*arguments, "-o", "ray.csv", "--ray", "--workers", "2")
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr  # Ray itself has notes of its own
    assert done.stdout.startswith(b"ray.csv: 4,100 rows, in ")
    assert Path("ray.csv").read_bytes() == Path("alone.csv").read_bytes()


# Signals


def long_input() -> list[str]:
    """Arguments that score three blocks of short texts, one of which cannot be used."""
    lines = [f"row {row}" for row in range(4100)]
    lines[2500] = "\udcff"
    Path("long.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return ["score", "-i", "long.txt", "--keep", "text"]


def started(*arguments: str) -> subprocess.Popen[bytes]:
    """A process that has written its first block."""
    journal = Path("out.csv.job.json")
    running = subprocess.Popen([*MBD, *arguments], stderr=subprocess.PIPE)
    while running.poll() is None and not (journal.exists() and '"num_rows": 2048' in journal.read_text()):
        pass
    return running


def test_a_killed_command_is_continued_to_the_same_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = long_input()
    run(capfd, *arguments, "-o", "whole.csv", code=EXIT_ROWS_FAILED)
    with started(*arguments, "-o", "out.csv") as running:
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert not Path("out.csv").exists()
    out, _ = run(capfd, *arguments, "-o", "out.csv", code=EXIT_ROWS_FAILED)
    assert out.startswith("out.csv: 4,100 rows, ")
    assert " of them now" in out
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_ctrl_c_keeps_what_is_written_and_exits_with_130() -> None:
    arguments = long_input()
    with started(*arguments, "-o", "out.csv") as running:
        running.send_signal(signal.SIGINT)
        assert running.stderr is not None
        said = running.stderr.read()
    assert running.returncode == 130
    assert b"Traceback" not in said
    assert Path("out.csv.partial").stat().st_size


def test_a_closed_pipe_ends_the_stream_quietly() -> None:
    arguments = long_input()
    command = [*MBD, *arguments, "--format", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert json.loads(running.stdout.readline())["row"] == 1
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141
