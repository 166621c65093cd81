"""What callers may pass as texts and prompts, and what they are told when it is something else.

This module knows types and vocabularies; tokenizing is the tokenizer's business.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from modernbert_decoder.errors import ArgumentError, InputError

Prompt = str | Sequence[int]
Text = str | tuple[str, str] | Sequence[int]


def is_integer(item: object) -> bool:
    """Whether it is an integer of any library, and not a truth value."""
    return isinstance(item, numbers.Integral) and not isinstance(item, bool)


def as_list(texts: Any) -> list[Any]:
    """One text or many, as a list: a string, a tuple of two strings or a flat list of integers is one."""
    if isinstance(texts, str) or is_pair(texts):
        return [texts]
    listed = list(_iterable(texts))
    if listed and all(is_integer(item) for item in listed):
        return [listed]
    return listed


def is_pair(text: object) -> TypeGuard[tuple[str, str]]:
    """Whether it is a tuple of two strings."""
    return isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)


def checked_ids(ids: Any, vocab_size: int) -> list[int]:
    """Token ids as plain integers.

    Raises:
        InputError: it is not a list of ids of the vocabulary, or is empty.
    """
    listed = list(_iterable(ids))
    if not listed:
        raise InputError("the prompt has no token ids; give at least [CLS]")
    for token_id in listed:
        if not is_integer(token_id) or not 0 <= token_id < vocab_size:
            raise InputError(
                f"prompt token ids must be integers from 0 to {vocab_size - 1}, got {token_id!r}"
            )
    return [int(token_id) for token_id in listed]


def checked_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An argument that must be an integer within bounds.

    Raises:
        ArgumentError: it is not.
    """
    if not is_integer(value) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError("", name, f" must be an integer {bounds}, got {value!r}")
    return int(value)


def _iterable(prompt: Any) -> Iterable[Any]:
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be text or a list of token ids, got {prompt!r}")
    return prompt
