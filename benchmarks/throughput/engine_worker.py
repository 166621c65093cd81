"""The engine as a worker that classifies: `LLM.iter_classify` as a user calls it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.protocol import reset_peak_memory, serve
from modernbert_decoder import LLM, ClassificationOutput
from modernbert_decoder.engine.outputs import TextError

_MEMORY_SAMPLES = 200


class EngineWorker:
    """One loaded classifier."""

    def __init__(self) -> None:
        self.llm: LLM

    def load(self, *, model: str, variant: str, threads: int) -> Mapping[str, Any]:
        """Load a checkpoint in the variant's format."""
        self.llm = LLM(model, dtype=variant, threads=threads)
        return {}

    def classify(self, *, texts: str) -> Mapping[str, Any]:
        """Seconds for all texts of a JSON file, and the labels they got."""
        listed = json.loads(Path(texts).read_text(encoding="utf-8"))
        reset_peak_memory()
        start = time.perf_counter()
        outputs = list(self.llm.iter_classify(listed))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "labels": [_label(output) for output in outputs]}

    def memory(self, *, texts: str, count: int) -> Mapping[str, Any]:
        """Resident bytes while `count` texts, those of the file over and over, pass through one call."""
        listed = json.loads(Path(texts).read_text(encoding="utf-8"))
        every = max(1, count // _MEMORY_SAMPLES)
        samples = []
        start = time.perf_counter()
        for i, output in enumerate(self.llm.iter_classify(_cycle(listed, count)), start=1):
            _label(output)
            if i % every == 0:
                samples.append({"texts": i, "bytes": resident_bytes()})
        return {"seconds": time.perf_counter() - start, "samples": samples}


def _label(output: ClassificationOutput | TextError) -> str:
    if isinstance(output, TextError):
        raise RuntimeError(output.message)
    return output.label


def _cycle(texts: list[str], count: int) -> Iterator[str]:
    """`count` texts, no two alike: each repetition is numbered."""
    for i in range(count):
        yield f"{texts[i % len(texts)]} {i}"


def resident_bytes() -> int:
    """This process's resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


if __name__ == "__main__":
    worker = EngineWorker()
    serve({"load": worker.load, "classify": worker.classify, "memory": worker.memory})
