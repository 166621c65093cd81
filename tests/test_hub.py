"""Finding models: bundled, in folders, and on a Hub that is a small server on the loopback interface.

Each Hub case runs in a process of its own, since huggingface_hub reads its environment once, when imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from checkpoints import BUNDLED_ARCHITECTURE
from loopback_hub import hub_environment, serving
from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint
from modernbert_decoder.errors import InputError, ModelNotFoundError

BUNDLED = find_checkpoint(BUNDLED_MODEL)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
# Revision -> the commit that it is, in every repository.
COMMITS = {"": COMMIT, "main": COMMIT, COMMIT: COMMIT, "v1": OLDER_COMMIT, OLDER_COMMIT: OLDER_COMMIT}
FIND = """
import sys
from pathlib import Path
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.errors import UserError
model, revision, cache_dir = sys.argv[1:]
try:
    print(find_checkpoint(model, revision=revision or None, cache_dir=Path(cache_dir)))
except UserError as error:
    print(f"{type(error).__name__}: {error}")
"""


class HubHandler(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that a download asks for."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, Path]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._describe(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo_id, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._send_file(self.repositories[repo_id] / name, commit=COMMITS[revision])
        else:
            self._send(404, b"")

    def _describe(self, path: str) -> None:
        for separator in ("/revision/", "/tree/"):
            repo_id, found, revision = path.partition(separator)
            if found:
                break
        if repo_id == "org/restricted":
            self._send(403, b"{}", error="GatedRepo")
        elif repo_id not in self.repositories:
            self._send(404, b"{}", error="RepoNotFound")
        elif revision not in COMMITS:
            self._send(404, b"{}", error="RevisionNotFound")
        else:
            self._list(repo_id, commit=COMMITS[revision], as_tree=separator == "/tree/" and bool(found))

    def _list(self, repo_id: str, *, commit: str, as_tree: bool) -> None:
        folder = self.repositories[repo_id]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if as_tree:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": f"{i:040x}"}
                for i, (name, path) in enumerate(zip(names, files, strict=True))
            ]
            self._send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": name} for name in names]
            content = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(content).encode())

    def _send_file(self, path: Path, *, commit: str) -> None:
        if path.is_file():
            etag = f'"{path.name}-{path.stat().st_size}"'
            self._send(200, path.read_bytes(), etag=etag, commit=commit)
        else:
            self._send(404, b"", error="EntryNotFound")

    def _send(
        self, status: int, body: bytes, *, error: str = "", etag: str = "", commit: str = COMMIT
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", commit)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Hub with a sound model, one of pickles and one without weights."""
    root = tmp_path_factory.mktemp("hub")
    sound = root / "sound"
    shutil.copytree(BUNDLED, sound)
    (sound / "pytorch_model.bin").write_bytes(b"pickle")
    (sound / "README.md").write_text("readme")
    (sound / "step-1").mkdir()
    (sound / "step-1" / "model.safetensors").write_bytes(b"another")
    pickled = root / "pickled"
    weightless = root / "weightless"
    for folder in (pickled, weightless):
        folder.mkdir()
        shutil.copy(BUNDLED / "config.json", folder)
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")

    class Handler(HubHandler):
        repositories: ClassVar[dict[str, Path]] = {
            "org/sound": sound,
            "org/pickled": pickled,
            "org/weightless": weightless,
        }

    with serving(Handler) as address:
        yield address


def downloading(cache: Path, *, endpoint: str, offline: bool = False) -> dict[str, str]:
    """That of a process which asks this Hub and draws progress bars as it would for a user."""
    environment = hub_environment(endpoint, home=cache / "home", offline=offline)
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    environment.pop("HF_TOKEN")  # what is asked for is public
    return environment


def find(model: str, cache: Path, *, endpoint: str, revision: str = "", offline: bool = False) -> str:
    """What `find_checkpoint` returns or raises in a fresh process."""
    environment = downloading(cache, endpoint=endpoint, offline=offline)
    command = [sys.executable, "-c", FIND, model, revision, str(cache)]
    result = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "%|" not in result.stderr  # no progress bar where standard error is no terminal
    return result.stdout.strip()


def test_a_download_fetches_only_what_is_needed_and_then_works_offline(hub: str, tmp_path: Path) -> None:
    folder = Path(find("org/sound", tmp_path, endpoint=hub))
    expected = {path.name for path in BUNDLED.iterdir()} - {"README.md"}
    assert {path.name for path in folder.iterdir()} == expected
    assert Checkpoint.open(folder).architecture == BUNDLED_ARCHITECTURE
    nowhere = "http://127.0.0.1:9"
    assert find("org/sound", tmp_path, endpoint=nowhere, offline=True) == str(folder)
    assert find("org/sound", tmp_path, endpoint=nowhere) == str(folder)
    assert folder.name == COMMIT


def test_a_revision_has_a_snapshot_of_its_own(hub: str, tmp_path: Path) -> None:
    folder = Path(find("org/sound", tmp_path, endpoint=hub, revision="v1"))
    assert folder.name == OLDER_COMMIT
    assert find("org/sound", tmp_path, endpoint=hub, revision=OLDER_COMMIT) == str(folder)
    assert find("org/sound", tmp_path, endpoint=hub) == str(folder.with_name(COMMIT))
    assert find("org/sound", tmp_path, endpoint="http://127.0.0.1:9", offline=True, revision="v1") == str(
        folder
    )


def test_generate_takes_a_hub_id_and_a_revision_and_then_works_offline(hub: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modernbert_decoder.cli", "generate", "--model", "org/sound"]
    command += ["--revision", "v1", "--temperature", "0", "--max-tokens", "5", "The"]
    texts = []
    for endpoint, offline in ((hub, False), ("http://127.0.0.1:9", True)):
        done = subprocess.run(
            command,
            env=downloading(tmp_path, endpoint=endpoint, offline=offline),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The")
    (snapshot,) = tmp_path.glob("home/hub/models--org--sound/snapshots/*")
    assert snapshot.name == OLDER_COMMIT


def test_an_unknown_repository_lists_what_was_tried(hub: str, tmp_path: Path) -> None:
    message = find("org/unknown", tmp_path, endpoint=hub)
    assert message.startswith("ModelNotFoundError: no model found under 'org/unknown'. Tried:\n")
    assert "- bundled models: storyteller" in message
    assert f"- a folder: {tmp_path / 'org' / 'unknown'} does not exist" in message
    assert "- the Hub, org/unknown at revision main: no such repository, or a private one" in message


def test_an_unknown_revision_and_a_restricted_repository_are_explained(hub: str, tmp_path: Path) -> None:
    message = find("org/sound", tmp_path, endpoint=hub, revision="v9")
    assert "org/sound at revision v9: the repository exists but has no revision 'v9'" in message
    message = find("org/restricted", tmp_path, endpoint=hub)
    assert f"access is restricted; accept the conditions at {hub}/org/restricted" in message


def test_repositories_of_pickles_or_without_weights_are_refused(hub: str, tmp_path: Path) -> None:
    message = find("org/pickled", tmp_path, endpoint=hub)
    assert message.startswith("CheckpointError: the Hub repository org/pickled holds no safetensors weights")
    assert "Pickle files are refused" in message
    assert "M.from_pretrained('org/pickled')" in message
    assert not list(tmp_path.rglob("*.bin"))
    message = find("org/weightless", tmp_path, endpoint=hub)
    assert message.startswith("CheckpointError: the Hub repository org/weightless holds no *.safetensors")


def test_an_unknown_model_while_offline_or_unreachable_says_what_to_do(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    message = find("org/unknown", tmp_path, endpoint=nowhere, offline=True)
    assert "offline mode is on (HF_HUB_OFFLINE)" in message
    assert "Traceback" not in message
    message = find("org/unknown", tmp_path, endpoint=nowhere)
    assert f"the Hub ({nowhere}) cannot be reached" in message


def test_a_cache_that_cannot_be_written_is_named(hub: str, tmp_path: Path) -> None:
    (tmp_path / "models--org--sound").write_text("a file where the cache wants a folder")
    message = find("org/sound", tmp_path, endpoint=hub)
    assert message.startswith("ModelNotFoundError: ")
    assert f"the cache {tmp_path} cannot be written" in message


def test_a_cache_made_by_other_tools_is_found_offline(tmp_path: Path) -> None:
    storage = tmp_path / "models--org--cached"
    snapshot = storage / "snapshots" / COMMIT
    shutil.copytree(BUNDLED, snapshot)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    nowhere = "http://127.0.0.1:9"
    assert find("org/cached", tmp_path, endpoint=nowhere, offline=True) == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    message = find("org/cached", tmp_path, endpoint=nowhere, offline=True)
    assert "the local cache holds org/cached without its weights" in message


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize(("show", "is_drawn"), [("True", True), ("False", False)])
def test_a_download_draws_a_progress_bar_on_a_terminal_unless_told_not_to(
    hub: str, tmp_path: Path, show: str, is_drawn: bool
) -> None:
    """That none is drawn elsewhere, `find` checks for every other case."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = FIND.replace("cache_dir=Path(cache_dir)", f"cache_dir=Path(cache_dir), show_progress={show}")
    command = [sys.executable, "-c", code, "org/sound", "", str(tmp_path)]
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                return
            if not data:
                return
            drawn.append(data)

    reader = Thread(target=read)
    reader.start()
    try:
        result = subprocess.run(
            command,
            env=downloading(tmp_path, endpoint=hub),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=120,
        )
    finally:
        os.close(theirs)
        reader.join(timeout=30)
        os.close(ours)
    assert result.returncode == 0
    assert (tmp_path / "models--org--sound").is_dir()
    assert (b"%|" in b"".join(drawn)) is is_drawn


# --- bundled models and folders ---------------------------------------------------------------------------


def test_the_bundled_model_is_found_without_importing_the_hubs_library(tmp_path: Path) -> None:
    code = (
        "import sys; from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint; "
        "Checkpoint.open(find_checkpoint('storyteller')); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_bundled_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / BUNDLED_MODEL).mkdir()
    assert find_checkpoint(BUNDLED_MODEL) == BUNDLED
    assert find_checkpoint(f"./{BUNDLED_MODEL}").resolve() == tmp_path / BUNDLED_MODEL
    assert find_checkpoint(Path(BUNDLED_MODEL)).resolve() == tmp_path / BUNDLED_MODEL


def test_a_folder_may_lie_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_checkpoint("~/model") == tmp_path / "model"


def test_a_file_is_refused_with_a_hint_at_its_folder() -> None:
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(ModelNotFoundError, match=f"is a file; give the folder that holds it: {BUNDLED}"):
            find_checkpoint(BUNDLED / name)


@pytest.mark.parametrize(
    "model",
    ["", "./missing", "/missing/folder", "a/b/c", "-x", "what is this?", "\0", "~nobody/x", "x" * 5000],
)
def test_what_cannot_be_a_hub_id_is_not_looked_up(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match="not tried, since this cannot be a Hub id"):
        find_checkpoint(model)


def test_a_revision_of_a_local_model_is_refused() -> None:
    for model in (BUNDLED_MODEL, str(BUNDLED)):
        with pytest.raises(InputError, match="revision 'v1' applies to models on the Hub"):
            find_checkpoint(model, revision="v1")
