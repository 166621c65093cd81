"""Servers on loopback ports, in threads of this process, with tiny random models and the bundled one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from servers import RunningServer, running

from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.serving.settings import ModelSource
from pipeline_checkpoints import write_with_tokenizer

LABELS = {0: "calm", 1: "angry", 2: "glad"}
CHAT_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> checkpoint folder: a language model on bytes, a classifier, a bare model, one that can chat."""
    root = tmp_path_factory.mktemp("served")
    classifier = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION, id2label=LABELS)
    found = {
        "tiny": write_checkpoint(root / "tiny", tiny_architecture(), seed=1),
        "labels": write_checkpoint(root / "labels", classifier, seed=2),
        "bare": write_checkpoint(root / "bare", tiny_architecture(head=Head.NONE), seed=3),
        "chat": write_with_tokenizer(root / "chat", seed=4),
    }
    (found["chat"] / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return found


@pytest.fixture(scope="session")
def sources(folders: dict[str, Path]) -> tuple[ModelSource, ...]:
    named = tuple(ModelSource(name, str(folder), "float32") for name, folder in folders.items())
    return (*named, ModelSource("storyteller", "storyteller"), ModelSource("exact", "storyteller", "w8a8"))


@pytest.fixture(scope="session")
def server(sources: tuple[ModelSource, ...]) -> Iterator[RunningServer]:
    """All models, no keys, patient limits; tests leave it as they find it."""
    with running(sources) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def alone(folders: dict[str, Path]) -> Iterator[LLM]:
    """The model "tiny" on an engine of its own, to compare with."""
    with LLM(folders["tiny"], dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def storyteller() -> Iterator[LLM]:
    """The model "exact", likewise. Its kernels give a row one result, whatever stands beside it."""
    with LLM("storyteller", dtype="w8a8") as llm:
        yield llm
