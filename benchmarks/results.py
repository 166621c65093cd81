"""The results of a run: everything that is published, as one object that becomes JSON and back.

Tables, plot and claims are made from this alone, so they can be rendered again without measuring.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cache_bytes import CacheBytes
from benchmarks.peers import Absent
from benchmarks.quality import Parity, Perplexity
from benchmarks.quantizing import QuantizingTime
from benchmarks.start_up import StartUp
from benchmarks.step_overhead import Overhead
from benchmarks.summary import Comparison, Row, Spread
from benchmarks.weight_bits import WeightBits

FORMAT = 1

T = TypeVar("T")
S = TypeVar("S", bound="Setting")


@dataclass(frozen=True)
class Setting:
    """When, where and with what something was measured: what the results of every benchmark begin with.

    Attributes:
        format: version of the layout of these results.
        date: of the run, ISO.
        machine: from `describe_machine`.
        threads: given to every peer.
        versions: package -> version, peers' included.
    """

    format: int
    date: str
    machine: dict[str, Any]
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Results(Setting):
    """One run.

    Attributes:
        features: peer -> what it says of itself: processor features in use.
        bandwidth: bytes per second read from memory, over all rounds.
        others_share: share of the processors that other programs took, over all rounds; None if unknown.
        is_quick: a short run, good for nothing but a look.
        notes: what was left out, and why.
        weight_bits: bits per weight of ours; empty in results of older versions.
        quantizing: seconds to quantize a model; empty in results of older versions.
    """

    features: dict[str, str]
    bandwidth: Spread | None
    others_share: Spread | None
    is_quick: bool
    absent: list[Absent]
    rows: list[Row]
    comparisons: list[Comparison]
    start_up: list[StartUp]
    overhead: list[Overhead]
    cache: list[CacheBytes]
    perplexity: list[Perplexity]
    parity: list[Parity]
    notes: list[str]
    weight_bits: list[WeightBits] = field(default_factory=list)
    quantizing: list[QuantizingTime] = field(default_factory=list)


def save(results: Setting, path: Path) -> None:
    """Write the results of any benchmark as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")


def load(kind: type[S], path: Path, *, format: int) -> S:
    """Read results of one kind, in the layout of this version, that `save` wrote.

    Raises:
        ValueError: another format, or fields missing or unknown.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("format") != format:
        raise ValueError(f"{path.name} has format {stored.get('format')!r}, this version reads {format}")
    return from_json(kind, stored)


def from_json(kind: type[T], stored: Any) -> T:
    """A dataclass from what `json.dumps(asdict(...))` made of it; fields with a default may be missing.

    Raises:
        ValueError: other fields are missing, or unknown.
    """
    value = _build(kind, stored, "results")
    assert isinstance(value, kind)
    return value


def _build(kind: Any, stored: Any, where: str) -> Any:
    """A value of an annotated type from JSON: dataclasses, lists of them, and optional ones."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if stored is None:
            return None
        return _build(next(each for each in typing.get_args(kind) if each is not type(None)), stored, where)
    if origin is list:
        (item,) = typing.get_args(kind)
        return [_build(item, each, f"{where}[{i}]") for i, each in enumerate(stored)]
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return stored
    names = {each.name for each in fields(kind)}
    required = {each.name for each in fields(kind) if not _has_default(each)}
    if not required <= set(stored) <= names:
        missing, unknown = sorted(required - set(stored)), sorted(set(stored) - names)
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build(hints[name], stored[name], f"{where}.{name}") for name in stored})


def _has_default(each: Field[Any]) -> bool:
    """Whether results of older versions may lack this field."""
    return each.default is not MISSING or each.default_factory is not MISSING
