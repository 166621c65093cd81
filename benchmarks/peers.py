"""Which peers there are, how their workers start, and which of them this machine has.

A peer that is not installed is reported by name with the way to install it, never left out in silence.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import REPOSITORY, Worker
from benchmarks.random_models import ensure_checkpoint
from benchmarks.summary import ENGINE, LLAMA, TRANSFORMERS
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint

CACHE = REPOSITORY / "benchmarks" / ".cache"
ENGINE_CACHE = CACHE / "engine"


@dataclass(frozen=True)
class Peer:
    """Something to measure: the module of its worker, what it needs, and how many tokens it decodes."""

    name: str
    module: str
    variants: tuple[str, ...]
    needs: tuple[str, ...]
    install: str
    environment_variable: str
    new_tokens: int


PEERS: tuple[Peer, ...] = (
    Peer(
        ENGINE,
        "benchmarks.engine_peer",
        ("float32", "int8", "int4", "int4-pure"),
        ("modernbert_decoder", "onnxruntime"),
        "pip install .",
        "MBD_ENGINE_PYTHON",
        64,
    ),
    Peer(
        LLAMA,
        "benchmarks.llama_peer",
        ("F32", "Q8_0", "Q4_0"),
        ("llama_cpp", "gguf"),
        "pip install llama-cpp-python gguf  (builds llama.cpp; needs a C++ compiler)",
        "MBD_LLAMA_PYTHON",
        64,
    ),
    Peer(
        TRANSFORMERS,
        "benchmarks.transformers_peer",
        ("float32",),
        ("torch", "transformers"),
        "pip install torch transformers",
        "MBD_TRANSFORMERS_PYTHON",
        16,  # its steps are long, and alike
    ),
)


@dataclass(frozen=True)
class Installed:
    """A peer and the interpreter that has it."""

    peer: Peer
    python: str


@dataclass(frozen=True)
class Absent:
    """A peer that cannot be measured here, and why."""

    peer: str
    reason: str
    install: str

    def __str__(self) -> str:
        return f"{self.peer} is absent ({self.reason}); install it with: {self.install}"


def find_peers(
    wanted: Sequence[str], interpreters: Mapping[str, str]
) -> tuple[dict[str, Installed], list[Absent]]:
    """The peers that are there and those that are not; `interpreters` maps a peer's name to a Python."""
    installed: dict[str, Installed] = {}
    absent: list[Absent] = []
    for peer in PEERS:
        if peer.name not in wanted:
            continue
        problem = import_problem(interpreters[peer.name], peer.needs)
        if problem is None:
            installed[peer.name] = Installed(peer, interpreters[peer.name])
        else:
            absent.append(
                Absent(
                    peer.name, problem, f"{peer.install}; or name its Python in {peer.environment_variable}"
                )
            )
    return installed, absent


def import_problem(python: str, modules: Sequence[str]) -> str | None:
    """The first module that this interpreter does not have, as a sentence; None if all are there."""
    check = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if not importlib.util.find_spec(m)])"
    try:
        done = subprocess.run(
            [python, "-c", check, *modules], capture_output=True, text=True, cwd=REPOSITORY, check=False
        )
    except OSError as error:
        return f"its Python cannot be started: {error.strerror}"
    if done.returncode != 0:
        return "its Python ended with an error"
    missing = done.stdout.split()
    return f"no module {missing[0]}" if missing else None


def start_worker(
    installed: Installed, variant: str, size: str, *, threads: int
) -> tuple[Worker, dict[str, Any]]:
    """A worker with its model loaded, and its answer to `load`."""
    peer = installed.peer
    worker = Worker(
        [installed.python, "-m", peer.module],
        environment={"MBD_CACHE": str(ENGINE_CACHE), "OMP_NUM_THREADS": str(threads)},
    )
    return worker, worker.ask("load", **load_arguments(peer.name, variant, size), threads=threads)


def load_arguments(peer: str, variant: str, size: str) -> dict[str, str]:
    """What the peer's `load` wants; the model's files are written first if need be."""
    if peer == LLAMA:
        return {"size": size, "variant": variant, "folder": str(CACHE)}
    if peer == ENGINE:
        return {"model": str(model_folder(size)), "variant": variant}
    return {"model": str(model_folder(size))}


def model_folder(name: str) -> Path:
    """The bundled model, or the random checkpoint of a size."""
    return find_checkpoint(name) if name == BUNDLED_MODEL else ensure_checkpoint(name, CACHE)
