"""Time from process start to the first token, in fresh processes and interleaved, with their peak memory.

A tiny launcher starts each command: it times the first byte on its output, and its own small size keeps the
peak memory it reports that of the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.llama_gguf import gguf_path
from benchmarks.peers import CACHE, ENGINE_CACHE, Installed, model_folder, start_worker
from benchmarks.protocol import REPOSITORY
from benchmarks.summary import ENGINE, LLAMA, TRANSFORMERS, Spread
from modernbert_decoder.checkpoint import BUNDLED_MODEL

_PROMPT = "Once upon a time"
START_UP_SIZE = "17m"
HELP = "mbd --help"
_MODELS = (START_UP_SIZE, BUNDLED_MODEL)
DTYPES = ("float32", "int8", "int4")  # ours, of every size
_LAUNCHER = """
import json, os, sys, time
begin = time.perf_counter()
reading, writing = os.pipe()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
                     file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_CLOSE, reading)])
os.close(writing)
first = None
while chunk := os.read(reading, 65536):
    first = first or time.perf_counter() - begin
_, status, usage = os.wait4(pid, 0)
total = time.perf_counter() - begin
print(json.dumps([first, total, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class StartUp:
    """One command's start: `seconds` to its first output."""

    peer: str
    variant: str
    model: str
    what: str
    seconds: Spread
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Command:
    peer: str
    variant: str
    model: str
    what: str
    arguments: tuple[str, ...]


def start_up_table(
    peers: Mapping[str, Installed], *, sizes: Sequence[str], rounds: int, report: Callable[[str], None]
) -> list[StartUp]:
    """The start to the first token, of ours in every size and format, of peers in one, and `mbd --help`."""
    commands = _commands(peers, sizes)
    times: dict[_Command, list[tuple[float, int]]] = {command: [] for command in commands}
    report(f"start-up: {len(commands)} commands, {rounds} rounds")
    for i in range(rounds + 1):
        for command in commands:
            seconds, peak = launch(command.arguments)
            if i > 0:  # the first round fills file caches and writes packed weights
                times[command].append((seconds, peak))
    return [
        StartUp(
            command.peer,
            command.variant,
            command.model,
            command.what,
            Spread.of(seconds for seconds, _ in results),
            max(peak for _, peak in results),
        )
        for command, results in times.items()
    ]


def launch(arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds to the first byte of output of a fresh process, and its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=_environment(),
    )
    first, _, peak, status = json.loads(done.stdout)
    if status != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}:\n{done.stderr[-2000:]}")
    if first is None:
        raise RuntimeError(f"{' '.join(arguments)} printed nothing:\n{done.stderr[-2000:]}")
    return first, peak if sys.platform == "darwin" else peak * 1024


def _environment() -> dict[str, str]:
    return {**os.environ, "MBD_CACHE": str(ENGINE_CACHE), "PYTHONPATH": str(REPOSITORY)}


def _engine_commands(python: str, sizes: Sequence[str]) -> list[_Command]:
    mbd = (python, "-m", "modernbert_decoder.cli")
    commands = []
    for name in dict.fromkeys((*_MODELS, *sizes)):
        model = str(model_folder(name))
        for dtype in DTYPES:
            options = ("--model", model, "--dtype", dtype, "--no-echo", "--seed", "1")
            commands.append(
                _Command(ENGINE, dtype, name, "first token", (*mbd, "generate", *options, _PROMPT))
            )
    return [*commands, _Command(ENGINE, "", "", HELP, (*mbd, "--help"))]


def _commands(peers: Mapping[str, Installed], sizes: Sequence[str]) -> list[_Command]:
    commands = []
    if ENGINE in peers:
        commands += _engine_commands(peers[ENGINE].python, sizes)
    if LLAMA in peers:
        worker, _ = start_worker(peers[LLAMA], "Q8_0", START_UP_SIZE, threads=1)  # writes the file
        worker.close()
        gguf = str(gguf_path(START_UP_SIZE, "Q8_0", CACHE))
        run = (peers[LLAMA].python, "-m", "benchmarks.llama_peer", gguf)
        commands.append(_Command(LLAMA, "Q8_0", START_UP_SIZE, "first token, without a tokenizer", run))
    if TRANSFORMERS in peers:
        script = (peers[TRANSFORMERS].python, "-m", "benchmarks.transformers_peer")
        for name in _MODELS:
            arguments = (*script, str(model_folder(name)), _PROMPT)
            commands.append(_Command(TRANSFORMERS, "float32", name, "first token", arguments))
    return commands
