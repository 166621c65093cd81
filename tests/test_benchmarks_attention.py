"""The attention benchmark: its forms compute the same, and its page is that of its results."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attention.__main__ import (  # noqa: E402
    CALLS,
    FORMAT,
    PUBLICATION,
    SIZES,
    AttentionResults,
    Row,
    is_complete,
    measure,
    page,
)
from benchmarks.attention.forms import FORMS, Attention, EightBits, Node, Shape, WholeScores  # noqa: E402
from benchmarks.experiments.measure import Ratio  # noqa: E402
from benchmarks.results import from_json  # noqa: E402

from checkpoints import relative_error, tiny_architecture  # noqa: E402
from modernbert_decoder.architecture import LayerKind  # noqa: E402

TINY = tiny_architecture(window=16, num_attention_heads=4)
SHAPES = [Shape(1, 1, 40, 64), Shape(3, 1, 40, 64), Shape(1, 30, 0, 64), Shape(2, 20, 100, 128)]


def mixed(form: type[Node], kind: LayerKind, shape: Shape) -> np.ndarray:
    """What comes out of the second of two calls, which finds in the caches what the first put there."""
    node = Attention(form, TINY, kind, shape, threads=1)
    node.run()
    first = node.mixed.copy()
    node.run()
    assert np.array_equal(node.mixed, first)
    return first


@pytest.mark.parametrize("kind", list(LayerKind))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_forms_attend_alike(kind: LayerKind, shape: Shape) -> None:
    expected = mixed(Node, kind, shape)
    assert np.abs(expected).max() > 0.1
    assert relative_error(mixed(WholeScores, kind, shape), expected) < 1e-5
    rounded = relative_error(mixed(EightBits, kind, shape), expected)
    assert 1e-4 < rounded < 0.05


def test_each_form_is_the_node_it_is_named_after() -> None:
    index = TINY.layer_kinds.index(LayerKind.FULL)
    graphs = [onnx.load_from_string(form(TINY).build_node(index)).graph for form in FORMS]
    nodes = [node for graph in graphs for node in graph.node]
    assert [node.op_type for node in nodes] == ["GroupQueryAttention"] * len(FORMS)
    assert [node.input[11] for node in nodes] == ["", "no_sinks", ""]
    assert ["kv_cache_bit_width" in {each.name for each in node.attribute} for node in nodes] == [
        False,
        False,
        True,
    ]


def test_a_measurement_has_a_row_for_every_form_and_compares_with_the_first() -> None:
    call = next(iter(CALLS))
    rows = list(measure("17m", call, LayerKind.SLIDING, rounds=2, threads=1))
    assert [row.form for row in rows] == [form.name for form in FORMS]
    assert rows[0].ratio == Ratio(1.0, 1.0, 1.0)
    assert all(row.seconds > 0 for row in rows)
    results = AttentionResults(
        FORMAT,
        "2026-01-01",
        {"cpu": "a processor", "flags": [], "logical_processors": 2, "memory_gib": 8, "system": "Linux"},
        2,
        {"numpy": "2"},
        is_quick=False,
        rows=rows,
    )
    assert from_json(AttentionResults, json.loads(json.dumps(asdict(results)))) == results
    assert f"| {call} | sliding | 17m |" in page(results)
    assert not is_complete(results)


def test_the_page_gives_medians_and_quartiles() -> None:
    rows = [
        Row(
            "17m",
            "full",
            "a call",
            form.name,
            2e-6,
            Ratio.of([8.0, 8.0, 8.0, 8.0, 8.0], [8.0, 4.0, 2.0, 2.0, 1.0]),
        )
        for form in FORMS
    ]
    machine = {"cpu": "a processor", "flags": [], "logical_processors": 2, "memory_gib": 8, "system": "Linux"}
    text = page(AttentionResults(FORMAT, "2026-01-01", machine, 2, {}, is_quick=True, rows=rows))
    assert "| a call | full | 17m | 2.00 | 4.00 (2.00 to 4.00) | 4.00 (2.00 to 4.00) |" in text


def test_the_page_is_that_of_the_newest_results() -> None:
    newest = max((ROOT / "benchmarks" / "results").glob("*-attention.json"))
    results = PUBLICATION.read(newest)
    assert is_complete(results)
    assert {row.size for row in results.rows} == set(SIZES)
    assert page(results) == (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
