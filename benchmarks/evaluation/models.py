"""Random language models of the released shapes with the real tokenizer, and task files made of LAMBADA.

Written once into a folder that git ignores. Speed does not depend on the weights' values; the results of the
tasks show only that both runtimes compute the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.random_models import random_tensors
from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.checkpoint import write_safetensors

_NUM_CHOICES = 4
_NUM_CHOICE_WORDS = 8


def ensure_model(size: str, folder: Path, shared: Path) -> Path:
    """The random model of this size in `folder`, written now if it is not there yet."""
    target = folder / f"language-model-{size}"
    if (target / "model.safetensors").exists():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    architecture = released_architecture(size)
    (target / "config.json").write_text(json.dumps(architecture.to_config(), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "data" / "ettin-tokenizer" / name, target / name)
    write_safetensors(target / "model.safetensors", random_tensors(architecture), {"format": "pt"})
    return target


def write_tasks(folder: Path, shared: Path, *, limit: int) -> dict[str, str]:
    """Task -> file: last words, endings to choose from (those of other passages), and whole passages."""
    lines = (shared / "data" / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:limit]]
    choices = []
    endings = [" ".join(text.split(" ")[-_NUM_CHOICE_WORDS:]) for text in texts]
    for i, text in enumerate(texts):
        question = " ".join(text.split(" ")[:-_NUM_CHOICE_WORDS])
        offered = list(dict.fromkeys(endings[(i + k) % len(endings)] for k in range(_NUM_CHOICES)))
        choices.append({"question": question, "choices": offered, "answer": 0})
    contents = {
        "lambada_file": [{"text": text} for text in texts],
        "multiple_choice_file": choices,
        "texts_file": [{"text": text} for text in texts],
    }
    files = {}
    for task, rows in contents.items():
        path = folder / f"{task}-{limit}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[task] = str(path)
    return files
