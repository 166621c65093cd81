"""Folders and files that the system does not let us search, read or write, whoever runs the tests.

Permissions do not stop root, so the refusals are made by the functions of `os` that everything goes through.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modernbert_decoder.atomic_files import WritingError, new_file, write_folder
from modernbert_decoder.cli import main

LOOKING = ("stat", "lstat", "listdir", "scandir", "readlink", "access")
CHANGING = ("mkdir", "unlink", "remove", "rmdir", "rename", "replace", "chmod")
GENERATE = ("generate", "--threads", "1", "--temperature", "0", "--max-tokens", "3", "The old king")


@contextmanager
def refused_below(folder: Path, *, error: int, looking: bool = True, changing: bool = True) -> Iterator[None]:
    """Looking at what lies below the folder, or changing it, fails with this error."""

    def is_refused(name: str, path: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if isinstance(path, int) or folder not in Path(os.path.abspath(os.fsdecode(path))).parents:
            return False
        if name in LOOKING:
            return looking
        if name == "open":
            mode = options.get("mode", arguments[0] if arguments else "r")
            is_reading = mode in ("r", "rb") if isinstance(mode, str) else mode & os.O_ACCMODE == os.O_RDONLY
            return looking if is_reading else changing
        return changing

    def guarded(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if is_refused(name, path, arguments, options):
                raise OSError(error, os.strerror(error), os.fspath(path))
            return function(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((os, (*LOOKING, *CHANGING, "open")), (io, ("open",)), (builtins, ("open",))):
            for name in names:
                patch.setattr(module, name, guarded(module, name))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MBD_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `mbd` in this process."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


REFUSALS = {
    "may not be searched": {"error": errno.EACCES},
    "may not be written": {"error": errno.EACCES, "looking": False},
    "is read-only": {"error": errno.EROFS, "looking": False},
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_cache_that_cannot_be_used_costs_one_warning(
    cache: Path, capsys: pytest.CaptureFixture[str], refusal: str, exists: bool
) -> None:
    if exists:
        cache.mkdir()
    with refused_below(cache if exists else cache.parent, **REFUSALS[refusal]):
        code, out, said = run(capsys, *GENERATE)
    assert code == 0, said
    assert said.startswith("mbd: warning: quantized weights cannot be kept")
    assert said.count("\n") == 1
    assert os.strerror(REFUSALS[refusal]["error"]) in said
    assert run(capsys, *GENERATE) == (0, out, "")


@pytest.mark.parametrize("kept", ["graphs", "packed"])
def test_a_cache_filled_by_somebody_else_who_keeps_it_private_is_not_needed(
    cache: Path, capsys: pytest.CaptureFixture[str], kept: str
) -> None:
    filled = run(capsys, *GENERATE)
    assert filled[0] == 0
    with refused_below(cache / kept, error=errno.EACCES):
        code, out, said = run(capsys, *GENERATE)
    assert (code, out) == filled[:2]
    assert said.count("mbd: warning") == (kept == "packed")
    assert run(capsys, *GENERATE) == filled


def test_mbd_cache_says_which_folder_cannot_be_read(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    for arguments in (("cache",), ("cache", "--clear"), ("cache", "--json")):
        with refused_below(cache, error=errno.EACCES):
            code, out, said = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert said.startswith(
            f"mbd: error: cannot read the cache folder {cache}: Permission denied. Set MBD_CACHE"
        )


@pytest.mark.parametrize("refusal", REFUSALS)
def test_quantize_into_a_folder_that_cannot_be_used_says_so(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    destination = place / "packed"
    with refused_below(place, **REFUSALS[refusal]):
        code, out, said = run(capsys, "quantize", "--dtype", "int8", "storyteller", str(destination))
    assert (code, out) == (2, "")
    reason = os.strerror(REFUSALS[refusal]["error"])
    assert said.startswith(f"mbd: error: cannot write {destination}: {reason}. Choose a folder")
    assert list(place.iterdir()) == []


def test_the_first_error_of_writing_is_told_and_not_that_of_cleaning_up(tmp_path: Path) -> None:
    with refused_below(tmp_path, error=errno.EACCES):
        with pytest.raises(WritingError, match="Permission denied"), new_file(tmp_path / "file"):
            pass
        with pytest.raises(WritingError, match="Permission denied"):
            write_folder(tmp_path / "folder", lambda folder: None)


def test_the_refusals_of_these_tests_are_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with refused_below(tmp_path, error=errno.EACCES):
        assert tmp_path.is_dir()
        for refused in (
            (tmp_path / "file").is_file,
            (tmp_path / "file").read_bytes,
            lambda: (tmp_path / "new").mkdir(),
            lambda: (tmp_path / "new").write_bytes(b""),
        ):
            with pytest.raises(PermissionError):
                refused()
    with refused_below(tmp_path, error=errno.EROFS, looking=False):
        assert (tmp_path / "file").read_text() == "{}"
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "file").write_text("")
