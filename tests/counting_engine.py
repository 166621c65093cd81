"""An engine that leaves word of being opened and works only once two are; for tests of Ray's workers."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.jobs.job import EngineOptions

_METHODS = ("iter_classify", "iter_score", "iter_embed", "iter_rank")
_PATIENCE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class CountingEngine(EngineOptions):
    """Opens the model; its work waits until `count` engines are open.

    Attributes:
        folder: holds a file for each engine that was opened, whose name begins with the process's id.
        count: of engines that must be open at the same time.
    """

    folder: str
    count: int = 2

    def open(self) -> LLM:
        """The engine."""
        llm = LLM(self.model, dtype=self.dtype, threads=self.threads)
        (Path(self.folder) / f"{os.getpid()}-{uuid.uuid4().hex}").touch()
        for name in _METHODS:
            setattr(llm, name, self._waiting(getattr(llm, name)))
        return llm

    def _waiting(self, method: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while len(os.listdir(self.folder)) < self.count:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"fewer than {self.count} engines were opened")
                time.sleep(0.01)
            return method(*arguments, **options)

        return called
