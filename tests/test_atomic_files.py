"""Files and folders appear whole under their final name, or not at all."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from modernbert_decoder import atomic_files
from modernbert_decoder.atomic_files import WritingError, new_file, write_folder
from modernbert_decoder.errors import InputError, ModelNotFoundError
from modernbert_decoder.safetensors_files import LazyArray, SafetensorsFile, write_safetensors

TENSORS: dict[str, Any] = {
    "bytes": np.arange(7, dtype=np.uint8),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "half": np.ones((2, 3), np.float16),
    "big_endian": np.arange(4, dtype=">f4"),
    "scalar": np.float32(3).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
}


def fail_with(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def fill_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_an_array_made_when_it_is_written_is_stored_like_any_other(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> Any:
        made.append(name)
        return np.full((2, 3), len(made), np.float32)

    lazy = {name: LazyArray((2, 3), np.dtype(np.float32), partial(make, name)) for name in ("b", "a")}
    write_safetensors(tmp_path / "model.safetensors", lazy)
    assert made == ["a", "b"]
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["a"], np.full((2, 3), 1, np.float32))
    np.testing.assert_array_equal(stored["b"], np.full((2, 3), 2, np.float32))


def test_written_safetensors_are_read_back_by_the_library_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS, {"format": "pt"})
    theirs = safetensors.numpy.load_file(path)
    ours = SafetensorsFile(path)
    assert theirs.keys() == ours.tensors.keys() == TENSORS.keys()
    assert ours.metadata == {"format": "pt"}
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(theirs[name], expected)
        np.testing.assert_array_equal(ours.raw(name), expected)
        assert ours.raw(name).flags.aligned
    assert min(tensor.begin for tensor in ours.tensors.values()) % 64 == 0
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_the_library_are_read_back_by_us(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = {name: np.ascontiguousarray(array) for name, array in TENSORS.items() if name != "big_endian"}
    safetensors.numpy.save_file(expected, path)
    ours = SafetensorsFile(path)
    for name, array in expected.items():
        np.testing.assert_array_equal(ours.raw(name), array.reshape(ours.tensors[name].shape))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    monkeypatch.setattr(atomic_files.os, "fsync", fail_with(number))
    with pytest.raises(
        WritingError, match=rf"cannot write {path}: the disk is full .* MB free at {tmp_path}"
    ):
        write_safetensors(path, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_text() == "old"


def test_an_interrupted_file_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(WritingError, match=r"cannot write .*No such file or directory"):
        write_safetensors(tmp_path / "missing" / "x.safetensors", TENSORS)


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("content")


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    destination = tmp_path / "a" / "b"
    write_folder(destination, fill)
    assert (destination / "sub" / "file").read_text() == "content"
    assert [path.name for path in destination.parent.iterdir()] == ["b"]


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    write_folder(destination, fill)
    with pytest.raises(InputError, match="exists and is not empty"):
        write_folder(destination, fill)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_folder(tmp_path / "file", fill)


def test_overwriting_replaces_model_folders_only(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    write_folder(destination, fill_model)
    (destination / "old").write_text("")
    write_folder(destination, fill, overwrite=True)
    assert sorted(path.name for path in destination.iterdir()) == ["config.json", "sub"]
    with pytest.raises(InputError, match=r"the folders in it \(sub\) would be lost"):
        write_folder(destination, fill, overwrite=True)
    assert (destination / "sub" / "file").read_text() == "content"
    (destination / "config.json").unlink()
    with pytest.raises(InputError, match="not a model folder"):
        write_folder(destination, fill, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), ModelNotFoundError("gone")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_while_filling_leaves_what_was_there(
    tmp_path: Path, error: BaseException, exists: bool
) -> None:
    destination = tmp_path / "out"
    if exists:
        write_folder(destination, fill_model)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error

    with pytest.raises(type(error)):
        write_folder(destination, fail, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    assert not exists or (destination / "config.json").is_file()


def test_a_full_disk_while_filling_names_the_destination(tmp_path: Path) -> None:
    def fill_up(folder: Path) -> None:
        (folder / "half").write_text("")
        with new_file(folder / "model.safetensors"):
            fail_with(errno.ENOSPC)()

    destination = tmp_path / "new" / "out"
    with pytest.raises(WritingError, match=rf"cannot write {destination}: the disk is full") as caught:
        write_folder(destination, fill_up)
    assert "partial" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_rename_puts_the_previous_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out"
    write_folder(destination, fill_model)
    rename = Path.rename

    def rename_all_but_the_new(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            fail_with(errno.EACCES)()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_all_but_the_new)
    with pytest.raises(WritingError, match="Choose a folder that you may write to"):
        write_folder(destination, lambda folder: (folder / "new").mkdir(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (destination / "config.json").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_folder_are_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").touch(mode=0o600)

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "model", write)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == mode


def test_only_what_was_begun_for_a_destination_is_removed(tmp_path: Path) -> None:
    for name in (".a[1].json.0a1b.partial", ".b.json.0a1b.partial", ".a1.json.0a1b.partial", "a[1].json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".a[1].json.2c3d.partial").mkdir()
    atomic_files.remove_unfinished(tmp_path / "a[1].json")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".b.json.0a1b.partial", ".a1.json.0a1b.partial", "a[1].json"}
    atomic_files.remove_unfinished(tmp_path / "nowhere" / "a")
