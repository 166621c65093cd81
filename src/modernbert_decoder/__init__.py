"""ModernBERT decoder language models: a fast inference engine, and what a checkpoint means.

The public names are loaded on first use, so that `import modernbert_decoder` costs nothing and the command
line starts at once. This module knows where each name lives and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modernbert_decoder.architecture import DecoderArchitecture
    from modernbert_decoder.engine.async_llm import AsyncLLM, EngineStats
    from modernbert_decoder.engine.llm import (
        LLM,
        ClassificationOutput,
        CompletionOutput,
        EmbeddingOutput,
        RankedCandidate,
        RequestOutput,
        Score,
        StreamChunk,
        TextError,
    )
    from modernbert_decoder.engine.sampling_params import SamplingParams
    from modernbert_decoder.engine.speculation import Speculation
    from modernbert_decoder.engine.structured import StructuredOutput
    from modernbert_decoder.errors import (
        CheckpointError,
        ConfigurationError,
        EngineClosedError,
        EngineFailedError,
        InputError,
        ModelNotFoundError,
        QueueFullError,
        RequestTimeoutError,
        UserError,
    )
    from modernbert_decoder.pipelines.factory import pipeline
    from modernbert_decoder.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "ClassificationOutput",
    "CompletionOutput",
    "ConfigurationError",
    "DecoderArchitecture",
    "EmbeddingOutput",
    "EngineClosedError",
    "EngineFailedError",
    "EngineStats",
    "InputError",
    "ModelNotFoundError",
    "QueueFullError",
    "RankedCandidate",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "Score",
    "Speculation",
    "StreamChunk",
    "StructuredOutput",
    "TextError",
    "Tokenizer",
    "UserError",
    "__version__",
    "pipeline",
]

# public name -> the module that defines it
_HOMES = MappingProxyType(
    {
        "LLM": "engine.llm",
        "AsyncLLM": "engine.async_llm",
        "EngineStats": "engine.async_llm",
        "ClassificationOutput": "engine.llm",
        "CompletionOutput": "engine.llm",
        "EmbeddingOutput": "engine.llm",
        "RankedCandidate": "engine.llm",
        "RequestOutput": "engine.llm",
        "Score": "engine.llm",
        "StreamChunk": "engine.llm",
        "TextError": "engine.llm",
        "SamplingParams": "engine.sampling_params",
        "StructuredOutput": "engine.structured",
        "Speculation": "engine.speculation",
        "DecoderArchitecture": "architecture",
        "Tokenizer": "tokenizer",
        "CheckpointError": "errors",
        "ConfigurationError": "errors",
        "EngineClosedError": "errors",
        "EngineFailedError": "errors",
        "InputError": "errors",
        "ModelNotFoundError": "errors",
        "QueueFullError": "errors",
        "RequestTimeoutError": "errors",
        "UserError": "errors",
        "pipeline": "pipelines.factory",
    }
)


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use.

    Raises:
        AttributeError: `name` is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
