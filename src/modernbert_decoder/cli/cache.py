"""`mbd cache`: how much is kept between runs, and its removal.

It knows the folders that the engine fills, not what is in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import click

from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, write, write_json, write_table

# Folder in the cache -> what lies there. Nothing else in the folder is counted or removed.
KEPT: Final = {"packed": "quantized weights", "graphs": "graphs"}


@click.command("cache", short_help="What is kept between runs, and its removal.")
@click.option("--clear", is_flag=True, help="Remove all of it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(clear: bool, as_json: bool) -> None:
    """Show the size of the cache folder, or clear it.

    Quantized weights and graphs are kept there, so that a model starts faster the next time; what is missing
    is made anew. Another folder can be chosen with the environment variable MBD_CACHE. Models from the Hub
    are kept by huggingface_hub: see `hf cache`.
    """
    with interrupts_deferred():
        from modernbert_decoder.checkpoint import cache_folder

    folder = cache_folder()
    entries, sizes = _contents(folder)
    if clear:
        for path in (path for paths in entries.values() for path in paths):
            _remove(path)
    if as_json:
        write_json({"folder": str(folder), "bytes": sizes, "cleared": clear})
        return
    write(f"{folder}{' (now empty)' if clear else ''}\n")
    rows = [(what, f"{len(entries[name])}", bytes_text(sizes[name])) for name, what in KEPT.items()]
    write_table(("removed" if clear else "kept", "entries", "size"), rows)


def _contents(folder: Path) -> tuple[dict[str, list[Path]], dict[str, int]]:
    """The entries of each kind, and their bytes together.

    Raises:
        InputError: the system does not let us look.
    """
    from modernbert_decoder.errors import InputError

    try:
        entries = {name: _entries(folder / name) for name in KEPT}
        return entries, {name: sum(map(_size, paths)) for name, paths in entries.items()}
    except OSError as error:
        raise InputError(
            f"cannot read the cache folder {folder}: {error.strerror or error}. Set MBD_CACHE to a folder of "
            "your own, or change its permissions"
        ) from error


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(_file_size(file) for file in files)


def _file_size(path: Path) -> int:
    """Bytes of a file; none of anything else, nor of what another process has just removed."""
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    """Removes an entry.

    Raises:
        InputError: the system does not let us.
    """
    from modernbert_decoder.errors import InputError

    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove {path}: {error.strerror or error}") from error
