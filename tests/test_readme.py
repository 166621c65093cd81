"""What the README shows is what happens: its marked blocks are executed, offline, with the bundled model.

A fenced bash or python block is marked by the line `<!-- run -->` directly above it. Each block runs by
itself, in an empty folder, and must succeed and print something.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TIMEOUT_SECONDS = 300
BLOCK = re.compile(r"^<!-- run -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A marked block: its language, code and the line its code starts on."""

    language: str
    code: str
    line: int


def marked_blocks(text: str) -> list[Block]:
    blocks = [
        Block(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1)
        for match in BLOCK.finditer(text)
    ]
    markers = len(re.findall(r"^<!-- run -->$", text, re.MULTILINE))
    if len(blocks) != markers:
        raise ValueError(f"{markers} markers but {len(blocks)} blocks: each fence follows its marker")
    return blocks


BLOCKS = marked_blocks(README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.language}-line-{block.line}")
def test_a_marked_readme_block_runs_and_prints(block: Block, tmp_path: Path) -> None:
    commands = {
        "bash": ["bash", "-euo", "pipefail", "-c", block.code],
        "python": [sys.executable, "-c", block.code],
    }
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        commands[block.language],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"README.md line {block.line}:\n{block.code}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"README.md line {block.line} printed nothing"


def test_the_readme_marks_a_command_and_a_python_example() -> None:
    assert {block.language for block in BLOCKS} >= {"bash", "python"}


def test_the_readme_shows_code_first_then_numbers_then_the_tree() -> None:
    text = README.read_text(encoding="utf-8")
    places = [text.index(f"<!-- {name} -->") for name in ("run", "benchmark:begin", "tree:begin")]
    assert places == sorted(places)
    assert BLOCKS[0].line <= 40


def tree_paths() -> list[Path]:
    """What the README's tree names, in its order."""
    text = README.read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree:begin -->\n```\n(.*?)```\n<!-- tree:end -->", text, re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    paths = []
    for line in tree[1].splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:indent], line.split()[0]]
        paths.append(ROOT.joinpath(*folders))
    return paths


def test_the_readme_tree_names_only_what_exists() -> None:
    for path in tree_paths():
        assert path.exists(), f"README's tree names {path.relative_to(ROOT)}, which does not exist"


def test_the_readme_tree_names_every_module_and_room_of_the_package() -> None:
    package = ROOT / "src" / "modernbert_decoder"
    rooms = [path.parent for path in package.glob("*/__init__.py")]
    missing = {*package.glob("*.py"), *rooms} - set(tree_paths())
    assert not missing, f"README's tree lacks {sorted(path.name for path in missing)}"


def test_a_marker_without_a_fence_is_refused() -> None:
    with pytest.raises(ValueError, match="1 markers but 0 blocks"):
        marked_blocks("<!-- run -->\n\nSome text.\n")


def test_a_block_without_a_marker_is_not_run() -> None:
    text = "```bash\nexit 1\n```\n\n<!-- run -->\n```bash\necho hello\n```\n"
    assert marked_blocks(text) == [Block("bash", "echo hello\n", 7)]
