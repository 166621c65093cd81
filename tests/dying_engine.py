"""An engine whose process ends in the midst of its work, once; for tests of Ray's workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.jobs.job import EngineOptions


@dataclass(frozen=True, kw_only=True)
class DyingEngine(EngineOptions):
    """Classifies; of all processes that share `mark`, the first that has answered two rows is killed.

    Attributes:
        mark: a file that is there as soon as one has died.
    """

    mark: str

    def open(self) -> LLM:
        """The engine."""
        llm = LLM(self.model, dtype=self.dtype, threads=self.threads)
        classify = llm.iter_classify

        def dies(texts: Any, **options: Any) -> Iterator[Any]:
            for number, output in enumerate(classify(texts, **options)):
                if number == 2 and self._is_first():
                    os.kill(os.getpid(), signal.SIGKILL)
                yield output

        llm.iter_classify = dies  # type: ignore[method-assign]
        return llm

    def _is_first(self) -> bool:
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
