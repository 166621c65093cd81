"""Rows to fine-tune on for tests: animals in sentences, labelled or answered."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANIMALS = ("fox", "hen", "owl")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, *, seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(seed)
    animals = [chosen.choice(ANIMALS) for _ in range(count)]
    return [{"text": f"{'so ' * chosen.randint(1, 6)}the {each}", "label": each} for each in animals]


def answered(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Answers of unequal length: processes learn unequal numbers of tokens in a step."""
    chosen = random.Random(seed)
    animals = [chosen.choice(ANIMALS) for _ in range(count)]
    return [{"prompt": f"the {each} says", "answer": " ho" * chosen.choice([1, 1, 9])} for each in animals]
