"""Random classifiers of the released shapes, with the real tokenizer of the released models.

Written once into a folder that git ignores. Speed does not depend on the weights' values; how far the
runtimes agree on labels is shown for what it is: agreement on random weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from benchmarks.random_models import random_tensors
from modernbert_decoder.architecture import Head, released_architecture
from modernbert_decoder.checkpoint import write_safetensors

_NUM_LABELS = 77


def ensure_classifier(size: str, folder: Path, shared: Path) -> Path:
    """The random classifier of this size in `folder`, written now if it is not there yet."""
    target = folder / f"classifier-{size}"
    if (target / "model.safetensors").exists():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    architecture = dataclasses.replace(
        released_architecture(size),
        head=Head.SEQUENCE_CLASSIFICATION,
        id2label={index: f"LABEL_{index}" for index in range(_NUM_LABELS)},
        problem_type="single_label_classification",
    )
    (target / "config.json").write_text(json.dumps(architecture.to_config(), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "data" / "ettin-tokenizer" / name, target / name)
    write_safetensors(target / "model.safetensors", random_tensors(architecture), {"format": "pt"})
    return target
