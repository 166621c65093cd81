"""Labels, scores, vectors and rankings need the base dependencies alone: the four commands and pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modernbert_decoder.architecture import Head
from pipeline_checkpoints import CLASSIFIER, NLI_LABELS, write_with_tokenizer
from test_base_install import base_python, run

__all__ = ["base_python"]  # the fixture is used by its name

PIPELINES = """
import json, sys
from modernbert_decoder import pipeline

classifier, bare = sys.argv[1:]
with pipeline("text-generation", "storyteller", max_new_tokens=4) as generate:
    (generated,) = generate("Once upon a time")
with pipeline("text-classification", classifier) as classify:
    (label,) = classify("The fox ran home.")
with pipeline("zero-shot-classification", classifier) as judge:
    judged = judge("The fox ran home.", ["animals", "the sea"])
with pipeline("feature-extraction", bare) as extract:
    (states,) = extract("The fox ran home.")
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps([generated["generated_text"], label["label"], judged["labels"], len(states[0]), heavy]))
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    return write_with_tokenizer(folder, head=CLASSIFIER, id2label=NLI_LABELS)


@pytest.mark.environment
def test_the_four_commands_run_with_base_dependencies_only(
    base_python: Path,
    classifier: Path,
    tmp_path: Path,
) -> None:
    commands = {
        "classify": ["-m", str(classifier)],
        "score": [],
        "embed": [],
        "rank": ["--candidate", " time", "--candidate", " hill"],
    }
    for name, options in commands.items():
        command = [base_python, "-m", "modernbert_decoder.cli", name, *options, "--format", "jsonl"]
        row = json.loads(run(*command, "Once upon a", cwd=tmp_path))
        assert row["error"] is None, name


@pytest.mark.environment
def test_the_four_pipelines_run_with_base_dependencies_only(
    base_python: Path,
    classifier: Path,
    tmp_path: Path,
) -> None:
    bare = write_with_tokenizer(tmp_path / "bare", head=Head.NONE)
    printed = run(base_python, "-c", PIPELINES, str(classifier), str(bare), cwd=tmp_path)
    text, label, labels, width, heavy = json.loads(printed)
    assert text.startswith("Once upon a time")
    assert label in NLI_LABELS.values()
    assert sorted(labels) == ["animals", "the sea"]
    assert width == 64
    assert heavy == []
