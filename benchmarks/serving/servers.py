"""Servers as processes: how each is started, when it answers, and which of them this machine has.

One that is not there is reported by name with the way to get it, never left out in silence.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.peers import CACHE, Absent, model_folder
from benchmarks.protocol import REPOSITORY
from benchmarks.serving.llama_model import ensure_server_gguf
from benchmarks.shapes import SHAPES

OURS, LLAMA, TRANSFORMERS = "mbd serve", "llama-server", "transformers serve"
LLAMA_VARIABLE = "MBD_LLAMA_SERVER"
# Where `make llama-server` puts it.
_BUILT_LLAMA = REPOSITORY / "build" / "llama.cpp" / "bin" / "llama-server"
# Slots of llama-server; each gets this much context.
LLAMA_SLOTS = 8
_SLOT_CONTEXT = 2048
_START_SECONDS = 180
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Setup:
    """One way to serve a model.

    Attributes:
        server: whose program it is.
        variant: weight format, and what else tells setups apart.
        size: of the model, or its name.
        command: that starts it; `{port}` stands for the port.
        model: what requests call the model.
    """

    server: str
    variant: str
    size: str
    command: Sequence[str]
    model: str


def ours(size: str, dtype: str, *, threads: int, options: Sequence[str] = (), variant: str = "") -> Setup:
    """`mbd serve`."""
    command = [
        *(sys.executable, "-m", "modernbert_decoder.cli", "serve", f"bench={model_folder(size)}:{dtype}"),
        *("--port", "{port}", "--threads", str(threads), *options),
    ]
    return Setup(OURS, variant or dtype, size, command, "bench")


def fastest(size: str, dtype: str, *, threads: int) -> Setup:
    """`mbd serve` with what makes it faster, at the price of memory and of answers that depend on others."""
    dtypes = f"{dtype}+w8a8"
    variant = f"{dtypes}, not batch-invariant"
    return ours(size, dtypes, threads=threads, options=("--no-batch-invariant",), variant=variant)


def llama(size: str, gguf_type: str, *, threads: int) -> Setup | Absent:
    """`llama-server` with parallel slots."""
    program = os.environ.get(LLAMA_VARIABLE) or shutil.which("llama-server")
    if program is None and _BUILT_LLAMA.is_file():
        program = str(_BUILT_LLAMA)
    if program is None:
        return Absent(
            LLAMA, "no such program", f"build it with `make llama-server`, or name one in {LLAMA_VARIABLE}"
        )
    path = ensure_server_gguf(SHAPES[size], gguf_type, CACHE)
    command = [
        *(program, "-m", str(path), "--port", "{port}", "--host", "127.0.0.1", "-np", str(LLAMA_SLOTS)),
        *("-c", str(LLAMA_SLOTS * _SLOT_CONTEXT), "-t", str(threads), "-tb", str(threads)),
    ]
    return Setup(LLAMA, gguf_type, size, command, "bench")


def transformers(size: str) -> Setup | Absent:
    """`transformers serve`, which answers /v1/completions in its newer releases."""
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        return Absent(TRANSFORMERS, "no such program", "pip install 'transformers[serving]' torch")
    model = str(model_folder(size))
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"]
    return Setup(TRANSFORMERS, "float32", size, command, model)


class RunningServer:
    """A process that answers completions; use it as a context manager.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message holds the end of what it said.
    """

    def __init__(self, setup: Setup, *, threads: int) -> None:
        self.setup = setup
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in setup.command],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "MBD_CACHE": str(CACHE / "engine"),
                "HF_HUB_OFFLINE": "1",
            },
        )
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """Of the server."""
        return self._process.pid

    def _await(self) -> None:
        """Asks for a token until one comes."""
        body = {"model": self.setup.model, "prompt": "a", "max_tokens": 1}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + _START_SECONDS
        reason = "it did not answer"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.setup.server} ended: {self._said()}")
            try:
                with urllib.request.urlopen(request, timeout=_START_SECONDS) as response:
                    json.load(response)
                return
            except urllib.error.HTTPError as error:
                if error.code not in (500, 503):
                    raise RuntimeError(
                        f"{self.setup.server} answers {error.code}: {error.read(500)!r}"
                    ) from None
                reason = f"status {error.code}"
            except OSError as error:
                reason = str(error)
            time.sleep(0.1)
        raise RuntimeError(f"{self.setup.server}: {reason}: {self._said()}")

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-1500:]

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
