"""The command line speaks of its own options and of the line that is wrong, and answers line by line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.cli import main
from modernbert_decoder.cli.job_command import EXIT_ROWS_FAILED
from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs import Classify, Rerank, ScoreTexts, map_files
from modernbert_decoder.jobs.standard_input import StandardInput, StreamDigest

MBD = (sys.executable, "-m", "modernbert_decoder.cli")
SECONDS = 120
LONG = "long " * 50  # 252 tokens of a byte each in the template


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MBD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a context of 128 bytes."""
    architecture = tiny_architecture(
        head=Head.SEQUENCE_CLASSIFICATION, id2label={0: "no", 1: "yes"}, max_position_embeddings=128
    )
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "classifier", architecture))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    architecture = tiny_architecture(max_position_embeddings=128)
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "lm", architecture))


def told(capfd: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """What a command says on standard error."""
    assert main(arguments) == code
    return capfd.readouterr().err


# --- options, not arguments ---


def test_rows_that_are_too_long_name_the_option_that_helps(
    classifier: str, language_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--format", "jsonl", "short", LONG)
    err = told(capfd, "classify", "-m", classifier, *options, code=EXIT_ROWS_FAILED)
    assert "252 tokens and at most 128 are taken; shorten it, or cut it with --truncate\n" in err
    err = told(capfd, "embed", "-m", language_model, *options, code=EXIT_ROWS_FAILED)
    assert "cut it with --truncate\n" in err
    err = told(capfd, "score", "-m", language_model, *options, code=EXIT_ROWS_FAILED)
    assert "score it in windows with --stride 64\n" in err
    assert main(("score", "-m", language_model, "--format", "jsonl", "--stride", "64", LONG)) == 0


def test_files_of_results_say_the_same(classifier: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text(f"short\n{LONG}\n")
    told(capfd, "classify", "-m", classifier, "-i", "a.txt", "-o", "a.jsonl", code=EXIT_ROWS_FAILED)
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert rows[1]["error"].endswith("cut it with --truncate")
    map_files(Classify(), ["a.txt"], "b.jsonl", model=classifier)
    rows = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
    assert rows[1]["error"].endswith("cut it with truncate=True")


OPTIONS = [
    (("classify", "--max-length", "500"), "--max-length must be an integer from 1 to 128, got 500"),
    (
        ("classify", "--truncate", "--max-length", "1", "--strict"),
        "--max-length is 1, but the template alone",
    ),
    (("rank", "--query", "q", "--by", "classifier"), "--label is missing; give one of"),
    (("rank", "--query", "q", "--by", "classifier", "--label", "x"), "--label is 'x', which there is not"),
]


@pytest.mark.parametrize(("arguments", "words"), OPTIONS, ids=lambda value: " ".join(value)[:40])
def test_refused_arguments_are_called_by_their_options(
    arguments: tuple[str, ...], words: str, classifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *options = arguments
    assert words in told(capfd, name, "-m", classifier, *options, "some text", code=2)


def test_other_commands_do_so_too(language_model: str, capfd: pytest.CaptureFixture[str]) -> None:
    err = told(capfd, "score", "-m", language_model, "--stride", "128", "some text", code=2)
    assert "--stride must be an integer from 1 to 127, got 128" in err
    err = told(capfd, "rank", "--candidate", "c", "--unconditional-text", "t", "some text", code=2)
    assert "--unconditional-text goes with --normalization unconditional only" in err


def test_python_callers_are_told_arguments(classifier: str) -> None:
    Path("a.txt").write_text("text\n")
    with pytest.raises(InputError, match=r"^label is missing"):
        map_files(Rerank(query="q", by="classifier"), ["a.txt"], "a.jsonl", model=classifier)
    with pytest.raises(InputError, match=r"^stride must be"):
        map_files(ScoreTexts(stride=5000), ["a.txt"], "b.jsonl", model="storyteller")


# --- which line ---


def test_run_names_the_line_that_is_wrong_behind_the_results_of_those_before(
    classifier: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("run", "--task", "text-classification", "-m", classifier, "--dtype", "float32")
    for last, words in (
        (LONG.encode(), "a text has 252 tokens, but the context holds 128; cut it with --truncation: 'long"),
        ("Caf\xe9".encode("latin-1"), "it is not valid UTF-8; convert it first"),
    ):
        data = b"one\n\nthree\n" + last + b"\nfive\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(options) == 2
        captured = capfd.readouterr()
        assert len(captured.out.splitlines()) == 3
        assert f"mbd: error: line 4 of standard input: {words}" in captured.err
    assert "cut it with --truncation: 'long" in told(capfd, *options, LONG, code=2)


# --- results as the lines come ---


@contextmanager
def running(*arguments: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Standard input and output of a command, which is killed if it does not answer."""
    with subprocess.Popen(
        [*MBD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            yield process.stdin, process.stdout
        finally:
            timer.cancel()
    assert process.returncode == 0


def test_a_line_is_answered_before_the_next_one_comes(language_model: str) -> None:
    with running("score", "-m", language_model, "--format", "jsonl") as (stdin, stdout):
        for row, text in enumerate((b"one\n", b"two\n", b"three\nfour\n"), 1):
            stdin.write(text)
            stdin.flush()
            assert json.loads(stdout.readline())["row"] == row
        assert json.loads(stdout.readline())["row"] == 4
        stdin.write(b"five")
        stdin.close()
        assert json.loads(stdout.readline())["num_bytes"] == 4


def test_the_table_begins_with_the_first_line(language_model: str) -> None:
    with running("score", "-m", language_model) as (stdin, stdout):
        stdin.write(b"one\n")
        stdin.flush()
        assert stdout.readline().split()[:2] == [b"row", b"text"]
        assert stdout.readline().split()[:2] == [b"1", b"one"]
        stdin.write(b"two\n")
        stdin.flush()
        assert stdout.readline().split()[:2] == [b"2", b"two"]
        stdin.close()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_put_together_however_they_arrive(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"one\n\ntwo and more\r\n" + b"x" * 500 + b"\nlast"

    class Slow(io.BytesIO):
        def read1(self, count: int | None = -1, /) -> bytes:
            return super().read1(size)

    class Stream:
        buffer: Any = Slow(data)

    monkeypatch.setattr("sys.stdin", Stream)
    digest = StreamDigest()
    stream = StandardInput(digest)
    expected = io.BytesIO(data)
    for limit in (-1, -1, 4, 3, -1, 100, -1, -1, -1):
        assert stream.readline(limit) == expected.readline(limit)
    whole = StreamDigest()
    whole.update(data)
    assert digest.hexdigest() == whole.hexdigest()
