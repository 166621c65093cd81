"""From a parsed YAML mapping to a frozen dataclass, refusing every key and value that would not be heeded.

The dataclass is the schema: names, types, defaults. Knows nothing of recipes.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from modernbert_decoder.training.errors import RecipeError

T = TypeVar("T")


def read_section(cls: type[T], value: Any, *, source: str, key: str = "") -> T:
    """An instance of a dataclass from a mapping, its sections included.

    Args:
        cls: a dataclass whose fields are booleans, numbers, texts, literals, tuples, dataclasses, or optional
            ones of these.
        value: what YAML gave.
        source: the file, for messages.
        key: where in the file the section stands.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong kind.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{source}: {key or 'the recipe'} is {_shown(value)}, but must be a table of keys")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise RecipeError(
                f"{source}: {_joined(key, name)} is not a key of a recipe. {_advice(name, known)}"
            )
    arguments = {}
    for name, field in known.items():
        if name in value:
            arguments[name] = _read(hints[name], value[name], source=source, key=_joined(key, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{source}: {_joined(key, name)} is missing; state it")
    try:
        return cls(**arguments)
    except RecipeError as error:
        prefix = f"{source}: {key}." if key else f"{source}: "
        raise RecipeError(f"{prefix}{error}") from None


def _read(kind: Any, value: Any, *, source: str, key: str) -> Any:
    if is_dataclass(kind):
        return read_section(kind, value, source=source, key=key)  # type: ignore[arg-type]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (inner,) = (part for part in parts if part is not type(None))
        return _read(inner, value, source=source, key=key)
    if origin is Literal:
        if value in parts and not isinstance(value, bool):
            return value
        raise RecipeError(f"{source}: {key} is {_shown(value)}; choose one of {', '.join(map(str, parts))}")
    if origin is tuple:
        return _read_list(parts, value, source=source, key=key)
    return _read_scalar(kind, value, source=source, key=key)


def _read_list(parts: tuple[Any, ...], value: Any, *, source: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{source}: {key} is {_shown(value)}, but must be a list; write [{_shown(value)}]")
    if parts[-1] is not Ellipsis and len(value) != len(parts):
        raise RecipeError(f"{source}: {key} has {len(value)} entries, but must have {len(parts)}")
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
    return tuple(
        _read(kind, entry, source=source, key=f"{key}[{i}]")
        for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _read_scalar(kind: type, value: Any, *, source: str, key: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    expected = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[kind]
    raise RecipeError(f"{source}: {key} is {_shown(value)}, but must be {expected}")


def _number(value: Any) -> float | int | None:
    """Numbers, and those that YAML 1.1 takes for text, such as 3e-3 and 4e9."""
    if isinstance(value, int):
        return value
    try:
        number = float(value.replace("_", "") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None  # neither infinite nor NaN


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _advice(name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Keys here: {', '.join(known)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
