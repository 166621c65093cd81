"""Workers as processes that load once and then obey JSON lines on stdin, answering on stdout.

A worker blocks in `read` while another one is timed, so peers interleave within one run without
disturbing each other. Standard library only: every interpreter of every peer imports this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parent.parent

# Prompts are random ids below this one: it leaves out the special tokens.
PROMPT_ID_LIMIT = 50_000
# For a worker to end after its input has.
_PATIENCE_SECONDS = 20

Operation = Callable[..., Mapping[str, Any]]


class WorkerError(RuntimeError):
    """A worker died or answered with an error; the message holds what it said."""


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start a new high-water mark, where the system can (Linux)."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        try:
            clear_refs.write_text("5")
        except OSError:
            return  # the mark then covers the whole life of the process


def take_stdout() -> TextIO:
    """Keep the real stdout for answers and send everything that libraries print to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(operations: Mapping[str, Operation]) -> None:
    """Answer requests `{"op": name, ...arguments}` until stdin closes or `{"op": "quit"}` arrives."""
    answers = take_stdout()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("op")
        if name == "quit":
            return
        try:
            answer = dict(operations[name](**request))
        except Exception:
            answer = {"error": traceback.format_exc(limit=4)}
        answer["peak_memory_bytes"] = peak_memory_bytes()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """A peer's process, seen from the harness."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        # Not a pipe: one that nobody reads would block a talkative library.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.said.seek(0)
            said = self.said.read()
            raise WorkerError(f"the worker ended while asked to {op!r}; its last words:\n{said[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"the worker failed at {op!r}:\n{answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        self.said.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
