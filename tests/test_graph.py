"""The graph: what it declares, and that quantized formats compute what their packed bytes say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from checkpoints import (
    Float32,
    open_runtime,
    random_ids,
    random_tensors,
    relative_error,
    tiny_architecture,
    whole_logits,
    write_checkpoint,
)
from modernbert_decoder.architecture import (
    DecoderArchitecture,
    LayerKind,
    RotaryParameters,
    released_architecture,
)
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.engine import graph_cache
from modernbert_decoder.engine.graph import build_graph
from modernbert_decoder.engine.weights import load_weights, rotary_tables
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.quantization import MatrixFormat, QuantizationScheme, dequantize, quantize

# The same products with unpacked and with stored weights: float32 rounding through the layers.
ROUNDING_TOLERANCE = 1e-4
# Root mean square over all logits, with activations rounded to 8 bits in each block before every product.
# Random weights pass such errors on without damping them; a layout error gives 1 and more.
ACTIVATION_TOLERANCE = 0.1
# A graph holds no weights: about 1 kB per node, whatever the width.
MAX_GRAPH_BYTES_PER_LAYER = 16_000

_BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
ARCHITECTURES: dict[str, DecoderArchitecture] = {
    "tied": tiny_architecture(),
    "untied": tiny_architecture(tie_word_embeddings=False),
    "no decoder bias": tiny_architecture(decoder_bias=False),
    "all biases": tiny_architecture(**_BIASES),
    "untied, all biases": tiny_architecture(tie_word_embeddings=False, **_BIASES),
    "two bases": tiny_architecture(
        rotary={LayerKind.FULL: RotaryParameters(), LayerKind.SLIDING: RotaryParameters(theta=100.0)}
    ),
    "odd sizes": tiny_architecture(hidden_size=48, num_attention_heads=1, intermediate_size=37),
    "width 192": tiny_architecture(hidden_size=192, num_attention_heads=3, intermediate_size=80),
}
SCHEMES: dict[str, QuantizationScheme] = {
    "float32": QuantizationScheme.named("float32"),
    "int8": QuantizationScheme.named("int8"),
    "int4": QuantizationScheme.named("int4"),
    "w8a8": QuantizationScheme.named("w8a8"),
    "int4, int4 vocabulary": QuantizationScheme.named("int4", "int4"),
    "int4 in blocks of 32": QuantizationScheme(MatrixFormat(4, 32), MatrixFormat(4, 32)),
    "float32, int8 vocabulary": QuantizationScheme.named("float32", "int8"),
    "int8, float32 vocabulary": QuantizationScheme.named("int8", "float32"),
    "blocks of 128": QuantizationScheme(MatrixFormat(8, 128), MatrixFormat(8, 16)),
}


Nodes = tuple[list[onnx.NodeProto], list[onnx.NodeProto]]


def parsed(architecture: DecoderArchitecture, scheme: str = "float32") -> onnx.GraphProto:
    return onnx.load_from_string(build_graph(architecture, SCHEMES[scheme], num_positions=64)).graph


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


# --- what it declares ---


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_graph_asks_for_exactly_the_weights_that_are_loaded(
    tmp_path: Path, name: str, scheme: str
) -> None:
    architecture = ARCHITECTURES[name]
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, architecture))
    loaded = {
        **load_weights(checkpoint, SCHEMES[scheme], threads=1),
        **rotary_tables(architecture, 64),
    }
    external = {
        tensor.name: tuple(tensor.dims)
        for tensor in parsed(architecture, scheme).initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert external == {name: array.shape for name, array in loaded.items()}


@pytest.mark.parametrize("full_every", [1, 2, 3, 9])
def test_sliding_layers_and_no_others_have_the_window(full_every: int) -> None:
    architecture = tiny_architecture(full_every=full_every, window=33)
    nodes = [node for node in parsed(architecture).node if node.op_type == "GroupQueryAttention"]
    windows = [attributes(node).get("local_window_size", -1) for node in nodes]
    assert windows == [33 if kind is LayerKind.SLIDING else -1 for kind in architecture.layer_kinds]


@pytest.mark.parametrize("is_for_pieces", [False, True])
def test_attention_has_sinks_where_texts_come_in_pieces(is_for_pieces: bool) -> None:
    """And they add nothing to the sums of softmax."""
    architecture = tiny_architecture(num_attention_heads=4)
    built = build_graph(architecture, SCHEMES["float32"], num_positions=64, is_for_pieces=is_for_pieces)
    graph = onnx.load_from_string(built).graph
    sinks = {node.input[11] for node in graph.node if node.op_type == "GroupQueryAttention"}
    assert sinks == ({"no_sinks"} if is_for_pieces else {""})
    values = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name in sinks]
    assert [array.tolist() for array in values] == ([[-np.inf] * 4] if is_for_pieces else [])


def upstream(graph: onnx.GraphProto, tensor: str, *, ends: tuple[str, ...]) -> Nodes:
    """The nodes that a tensor is made by, and those of the given types at which the way back ended."""
    producers = {output: node for node in graph.node for output in node.output}
    passed: dict[str, onnx.NodeProto] = {}
    ended: dict[str, onnx.NodeProto] = {}
    waiting = [tensor]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.output[0] in passed:
            continue
        if node.op_type in ends:
            ended[node.output[0]] = node
        else:
            passed[node.output[0]] = node
            waiting += node.input
    return list(passed.values()), list(ended.values())


@pytest.mark.parametrize("scheme", ["float32", "int8", "int4", "w8a8"])
@pytest.mark.parametrize("name", ["tied", "untied, all biases"])
def test_the_head_computes_only_the_positions_asked_for(name: str, scheme: str) -> None:
    """Every way back from the logits comes to their choice of positions right behind head and norm."""
    head, ended = upstream(
        parsed(ARCHITECTURES[name], scheme), "logits", ends=("Gather", "GroupQueryAttention")
    )
    assert [(node.op_type, node.input[1]) for node in ended] == [("Gather", "logit_positions")]
    weights = [each for node in head for each in node.input]
    assert any(each.startswith("lm_head.dense.weight") for each in weights)
    assert any(each.startswith("model.final_norm.weight") for each in weights)
    assert not any(each.startswith("model.layers.") for each in weights)


@pytest.mark.parametrize("size", ["17m", "1b"])
def test_a_graph_stays_small_because_its_weights_lie_outside(size: str) -> None:
    architecture = released_architecture(size)
    graph = build_graph(architecture, SCHEMES["int8"], num_positions=7999)
    assert len(graph) < MAX_GRAPH_BYTES_PER_LAYER * architecture.num_hidden_layers


def test_layer_kinds_with_one_rotary_embedding_share_its_tables() -> None:
    def tables(architecture: DecoderArchitecture) -> list[str]:
        return [t.name for t in parsed(architecture).initializer if t.name.startswith("rotary.")]

    assert len(tables(ARCHITECTURES["tied"])) == 2
    assert len(tables(ARCHITECTURES["two bases"])) == 4
    assert len(tables(tiny_architecture(full_every=1))) == 2


def test_a_tied_matrix_is_declared_once() -> None:
    names = [tensor.name for tensor in parsed(ARCHITECTURES["tied"]).initializer]
    assert len(names) == len(set(names))
    assert not any(name.startswith("decoder.weight") for name in names)
    assert "decoder.weight" in [tensor.name for tensor in parsed(ARCHITECTURES["untied"]).initializer]


@pytest.mark.parametrize(("hidden_size", "heads"), [(64, 8), (72, 3), (40, 1)])
def test_a_head_width_that_the_kernel_cannot_rotate_is_refused(hidden_size: int, heads: int) -> None:
    architecture = tiny_architecture(hidden_size=hidden_size, num_attention_heads=heads)
    with pytest.raises(ConfigurationError, match=rf"head width is {hidden_size // heads}.* multiple of 16"):
        build_graph(architecture, SCHEMES["float32"], num_positions=64)


# --- quantized formats ---


def rounded(tensors: dict[str, Any], scheme: QuantizationScheme) -> dict[str, Any]:
    """The tensors as a scheme stores them. Rows are rounded alone, so q, k and v need not be joined."""
    result = {}
    for name, tensor in tensors.items():
        matrix = scheme.format_of(name)
        if tensor.ndim == 2 and matrix.bits < 32:
            tensor = dequantize(quantize(tensor, matrix.fitted(tensor.shape[1])))
        result[name] = tensor
    return result


every_format = pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "float32"])


def quantized_and_exact(
    folder: Path, architecture: DecoderArchitecture, scheme: str
) -> tuple[Float32, Float32]:
    """Logits of the quantized engine, and of the float32 engine on the weights that the packed bytes mean."""
    tensors = random_tensors(architecture)
    original = write_checkpoint(folder / "original", architecture, tensors=tensors)
    exact = write_checkpoint(folder / "rounded", architecture, tensors=rounded(tensors, SCHEMES[scheme]))
    ids = random_ids(architecture, 150)
    quantized = open_runtime(original, scheme=SCHEMES[scheme], context_length=160)
    return whole_logits(quantized, ids), whole_logits(open_runtime(exact, context_length=160), ids)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("float32", "w8a8")])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_quantized_engine_equals_the_float32_engine_on_the_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    """Compared with float32 activations, which the kernels can be told to keep."""
    monkeypatch.setattr("modernbert_decoder.engine.graph._ACCURACY_INT8", 1)
    logits, exact = quantized_and_exact(tmp_path, ARCHITECTURES[name], scheme)
    assert relative_error(logits, exact) < ROUNDING_TOLERANCE


@every_format
def test_rounding_activations_as_well_costs_little(tmp_path: Path, scheme: str) -> None:
    logits, exact = quantized_and_exact(tmp_path, ARCHITECTURES["width 192"], scheme)
    assert np.linalg.norm(logits - exact) / np.linalg.norm(exact) < ACTIVATION_TOLERANCE
    assert not np.array_equal(logits, exact)


@pytest.mark.parametrize("name", ["all biases", "odd sizes"])
def test_integer_products_of_seven_bit_activations_cost_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What runs on processors whose products of bytes are cut off at 16 bits."""
    exact_folder = write_checkpoint(tmp_path / "exact", ARCHITECTURES[name])
    monkeypatch.setattr("checkpoints.build_graph", functools.partial(build_graph, activation_levels=63))
    ids = random_ids(ARCHITECTURES[name], 150)
    logits = whole_logits(open_runtime(exact_folder, scheme="w8a8", context_length=160), ids)
    exact = whole_logits(open_runtime(exact_folder, context_length=160), ids)
    assert np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 2 * ACTIVATION_TOLERANCE


def test_a_token_of_zeros_gives_zeros(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["tied"]
    tensors = {name: np.zeros_like(tensor) for name, tensor in random_tensors(architecture).items()}
    folder = write_checkpoint(tmp_path, architecture, tensors=tensors)
    logits = whole_logits(open_runtime(folder, scheme="w8a8", context_length=160), [1, 2, 3])
    assert not logits.any()


@pytest.mark.parametrize("saturates", [False, True])
def test_the_graph_keeps_integer_products_within_what_the_processor_can(
    cache: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    monkeypatch.setattr(graph_cache, "products_saturate", lambda: saturates)
    architecture, scheme = ARCHITECTURES["tied"], SCHEMES["w8a8"]
    cached = graph_cache.cached_graph(architecture, scheme, num_positions=64)
    levels = 63 if saturates else 127
    assert cached == build_graph(architecture, scheme, num_positions=64, activation_levels=levels)


def test_the_probe_tells_whether_products_are_exact(cache: Path) -> None:
    """Where it says they are, integer products of the largest values must be the true ones."""
    assert graph_cache.products_saturate() in (False, True)
    assert graph_cache.products_saturate() == graph_cache.products_saturate()
    assert len(list(cache.glob("probe-*.onnx"))) == 1


# --- the graph cache ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


def test_a_cached_graph_equals_the_built_one(cache: Path) -> None:
    architecture, scheme = ARCHITECTURES["tied"], SCHEMES["int8"]
    built = build_graph(architecture, scheme, num_positions=64)
    for _ in range(2):
        assert graph_cache.cached_graph(architecture, scheme, num_positions=64) == built
        (path,) = cache.iterdir()
        assert path.read_bytes().endswith(built)


@pytest.mark.parametrize("damage", [lambda kept: kept[:-100], lambda kept: b"x" + kept[1:], lambda kept: b""])
def test_a_damaged_graph_is_built_anew(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    architecture, scheme = ARCHITECTURES["tied"], SCHEMES["int8"]
    built = graph_cache.cached_graph(architecture, scheme, num_positions=64)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert graph_cache.cached_graph(architecture, scheme, num_positions=64) == built
    assert path.read_bytes().endswith(built)


def test_a_second_start_reads_its_graph_without_building_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, scheme = ARCHITECTURES["tied"], SCHEMES["int8"]
    first = graph_cache.cached_graph(architecture, scheme, num_positions=64)
    monkeypatch.setattr("modernbert_decoder.engine.graph.build_graph", None)
    assert graph_cache.cached_graph(architecture, scheme, num_positions=64) == first


def test_graphs_of_different_models_schemes_and_lengths_are_kept_apart(cache: Path) -> None:
    tied = ARCHITECTURES["tied"]
    asked = [
        (tied, "int8", 64),
        (tied, "int4", 64),
        (tied, "int8", 65),
        *((architecture, "int8", 64) for name, architecture in ARCHITECTURES.items() if name != "tied"),
        (dataclasses.replace(tied, window=63), "int8", 64),
        (dataclasses.replace(tied, norm_eps=1e-6), "int8", 64),
    ]
    for _ in range(2):
        for architecture, scheme, num_positions in asked:
            cached = graph_cache.cached_graph(architecture, SCHEMES[scheme], num_positions=num_positions)
            assert cached == build_graph(architecture, SCHEMES[scheme], num_positions=num_positions)
    assert len(list(cache.iterdir())) == len(asked)


def test_a_cache_folder_that_cannot_be_written_costs_only_the_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("MBD_CACHE", str(blocker / "cache"))
    graph = graph_cache.cached_graph(ARCHITECTURES["tied"], SCHEMES["int8"], num_positions=64)
    assert graph == build_graph(ARCHITECTURES["tied"], SCHEMES["int8"], num_positions=64)
