"""Doctests of a room whose extra is not installed are not collected: importing the room would fail."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

ROOMS = Path(__file__).resolve().parent / "src" / "modernbert_decoder"
NEEDS = {
    "evaluation": ("lm_eval",),
    "pytorch": ("torch", "transformers"),
    "training": ("torch", "transformers", "accelerate", "optimi", "peft"),
}

collect_ignore = [str(ROOMS / room) for room, names in NEEDS.items() if not all(map(find_spec, names))]
