"""The head is computed for the rows that are asked for, and for no others: told from the graph itself."""

from __future__ import annotations

import onnx
import pytest

from checkpoints import tiny_architecture
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.graph import build_graph
from modernbert_decoder.quantization import QuantizationScheme


def weights_before_the_selection(graph: onnx.GraphProto, weight: str, selection: str) -> tuple[set[str], int]:
    """What lies between the node that uses `weight` and the gatherings of rows by `selection` before it.

    Returns:
        The initializers of all nodes that precede the one with `weight`, those beyond a gathering left out,
        and how many gatherings there are.
    """
    makers = {output: node for node in graph.node for output in node.output}
    initializers = {tensor.name for tensor in graph.initializer}
    (head,) = (node for node in graph.node if any(name.startswith(weight) for name in node.input))
    found: set[str] = set()
    num_gatherings = 0
    seen: set[str] = set()
    waiting = [name for name in head.input if name not in initializers]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in makers:
            continue
        seen.add(name)
        node = makers[name]
        if node.op_type == "Gather" and selection in node.input:
            num_gatherings += 1
            continue
        found.update(set(node.input) & initializers)
        waiting += [each for each in node.input if each not in initializers]
    return found, num_gatherings


@pytest.mark.parametrize("scheme", ["float32", "int8", "w8a8"])
@pytest.mark.parametrize("is_selective", [False, True])
def test_only_the_rows_asked_for_go_through_the_head(is_selective: bool, scheme: str) -> None:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION)
    built = build_graph(
        architecture, QuantizationScheme.named(scheme), num_positions=64, is_selective=is_selective
    )
    graph = onnx.load_from_string(built).graph
    found, num_gatherings = weights_before_the_selection(graph, "head.dense.weight", "logit_positions")
    assert num_gatherings == 1
    assert "model.final_norm.weight" in found
    assert not [name for name in found if name.startswith("model.layers.")]
    # The search would find layers: it does, where another selection is looked for.
    all_before, _ = weights_before_the_selection(graph, "head.dense.weight", "another_input")
    assert any(name.startswith("model.layers.0.") for name in all_before)
