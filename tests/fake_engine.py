"""An engine for tests of jobs: answers follow from the text alone, at once, in the engine's own classes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from modernbert_decoder.engine.outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    RankedCandidate,
    Score,
    TextError,
)
from modernbert_decoder.jobs.job import EngineOptions

LABELS = {0: "no", 1: "yes", 2: "perhaps"}
CONTEXT = 1000  # characters


class FakeLLM:
    """The `iter_*` methods of `LLM`; texts of more than `CONTEXT` characters are too long."""

    def __init__(self) -> None:
        self.architecture = SimpleNamespace(id2label=LABELS)

    def iter_classify(
        self, texts: Iterable[Any], *, truncate: bool = False, max_length: int | None = None
    ) -> Iterator[ClassificationOutput | TextError]:
        for text in texts:
            length = len(text if isinstance(text, str) else "".join(text))
            if length > (max_length or CONTEXT) and not truncate:
                yield TextError(f"the text has {length} tokens")
                continue
            raw = np.array([number(text, salt) for salt in range(3)])
            probabilities = np.exp(raw) / np.exp(raw).sum()
            yield ClassificationOutput(
                num_tokens=length,
                logits=tuple(raw.tolist()),
                probabilities=tuple(probabilities.tolist()),
                label=LABELS[int(raw.argmax())],
            )

    def iter_score(self, texts: Iterable[str], *, stride: int | None = None) -> Iterator[Score | TextError]:
        for text in texts:
            if len(text) > CONTEXT and stride is None:
                yield TextError(f"the text has {len(text)} tokens")
            else:
                data = text.encode("utf-8", "replace")
                yield Score(
                    token_ids=(1, *data),
                    logprobs=tuple(-0.01 * (byte + 1) for byte in data),
                    num_bytes=len(data),
                )

    def iter_embed(
        self,
        texts: Iterable[str],
        *,
        pooling: str,
        normalize: bool,
        truncate: bool,
        max_length: int | None,
    ) -> Iterator[EmbeddingOutput | TextError]:
        for text in texts:
            vector = np.array([number(text, salt) for salt in range(6)], np.float32)
            yield EmbeddingOutput(len(text), vector / np.linalg.norm(vector) if normalize else vector)

    def iter_rank(
        self,
        items: Iterable[tuple[str, Sequence[str]]],
        *,
        normalization: str = "sum",
        unconditional_text: str = "",
    ) -> Iterator[list[RankedCandidate] | TextError]:
        for text, candidates in items:
            if len(text) > CONTEXT:
                yield TextError(f"the text has {len(text)} tokens")
                continue
            ranked = [
                RankedCandidate(
                    index=index,
                    candidate=candidate,
                    num_tokens=len(candidate),
                    total_logprob=-number(text + candidate, 1),
                    score=-number(text + candidate, 1),
                )
                for index, candidate in enumerate(candidates)
            ]
            yield sorted(ranked, key=lambda entry: -entry.score)

    def close(self) -> None:
        pass


def number(text: Any, salt: int) -> float:
    """From 0 to 1, by the text."""
    return zlib.crc32(repr((text, salt)).encode()) / (1 << 32)


@dataclass(frozen=True, kw_only=True)
class FakeEngine(EngineOptions):
    """Opens a `FakeLLM`; its identity is the model's name."""

    model: str = "fake"

    def open(self) -> Any:
        return FakeLLM()

    def identity(self) -> dict[str, Any]:
        return {"name": self.model}
