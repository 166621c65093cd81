"""Block formats: what rounding loses, what it never loses, and that ONNX Runtime reads the same bytes."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from checkpoints import Float32, tiny_architecture
from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError
from modernbert_decoder.quantization import (
    MatrixFormat,
    PackedMatrix,
    QuantizationScheme,
    dequantize,
    fused_shapes,
    quantize,
)

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 32)
FORMATS = {
    "int8": INT8,
    "int8, blocks of 16": MatrixFormat(8, 16),
    "int4": INT4,
    "int4, blocks of 16": MatrixFormat(4, 16),
}
# Half a step, and the float32 rounding of the division, the product and the scale itself.
HALF_STEP = 0.5 * (1 + 1e-4)
# A block's value on the far side of its extreme may be clipped by one step: 8 levels down, 7 up.
CLIPPED_STEP = 1.0 * (1 + 1e-4)
# float32 sums of a few hundred products, compared with float64.
PRODUCT_TOLERANCE = 1e-5
# With accuracy_level 4 activations are rounded to 8 bits in each block: 1/254 of the largest, averaged out.
ACTIVATION_TOLERANCE = 0.02

every_format = pytest.mark.parametrize("matrix", list(FORMATS.values()), ids=list(FORMATS))


def normal(rows: int, columns: int, *, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def steps(packed: PackedMatrix, columns: int) -> NDArray[np.float64]:
    """The distance of two neighbouring levels at every place of the matrix."""
    wide = np.repeat(np.abs(packed.scales.astype(np.float64)), packed.format.block_size, axis=1)
    return wide[:, :columns]


def error(weight: Float32, packed: PackedMatrix) -> NDArray[np.float64]:
    return np.abs(dequantize(packed).astype(np.float64) - weight)


@st.composite
def matrices(draw: st.DrawFn) -> Float32:
    """Shapes that divide into blocks and shapes that do not, values of very different sizes, zeros."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    weight = normal(rows, columns, seed=draw(st.integers(0, 1000)))
    weight *= np.float32(10.0 ** draw(st.integers(-15, 15)))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, columns - 1)) :] = 0
    if draw(st.booleans()):
        weight[0, draw(st.integers(0, columns - 1))] *= np.float32(1000)
    if draw(st.booleans()):
        weight = np.abs(weight)
    return weight


# --- rounding ---


@every_format
@given(weight=matrices())
@settings(deadline=None, max_examples=60)
def test_packing_keeps_the_shape_and_packing_again_changes_little(
    matrix: MatrixFormat, weight: Float32
) -> None:
    packed = quantize(weight, matrix)
    once = dequantize(packed)
    assert once.shape == weight.shape == packed.shape
    assert once.dtype == np.float32
    assert np.isfinite(once).all()
    bound = {8: HALF_STEP, 4: CLIPPED_STEP}[matrix.bits] * steps(packed, weight.shape[1])
    assert (error(once, quantize(once, matrix)) <= bound).all()


@given(weight=matrices())
@settings(deadline=None)
def test_int8_errs_by_at_most_half_a_step(weight: Float32) -> None:
    packed = quantize(weight, INT8)
    assert (error(weight, packed) <= HALF_STEP * steps(packed, weight.shape[1])).all()
    largest = np.abs(np.pad(weight, ((0, 0), (0, -weight.shape[1] % 64)))).reshape(len(weight), -1, 64).max(2)
    np.testing.assert_allclose(packed.scales, largest / 127, rtol=1e-6)


@given(weight=matrices())
@settings(deadline=None)
def test_int4_errs_by_at_most_a_step_of_the_full_range(weight: Float32) -> None:
    """Smaller scales are chosen only where they lower the squared error of the whole block."""
    packed = quantize(weight, INT4)
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 32))).reshape(len(weight), -1, 32)
    values = padded.astype(np.float64)
    extreme = np.take_along_axis(values, np.abs(values).argmax(2)[..., None], 2)
    full = -extreme / 8
    levels = np.clip(np.rint(np.divide(values, full, out=np.zeros_like(values), where=full != 0)), -8, 7)
    plain = np.square(levels * full - values).sum(2)
    ours = np.pad(error(weight, packed), ((0, 0), (0, -weight.shape[1] % 32))).reshape(values.shape)
    assert (np.square(ours).sum(2) <= plain * (1 + 1e-3)).all()
    assert (np.abs(levels * full - values) <= CLIPPED_STEP * np.abs(full)).all()
    assert (np.abs(packed.scales) <= np.abs(full[..., 0]) * (1 + 1e-6)).all()


@every_format
def test_values_on_the_levels_are_kept_exactly(matrix: MatrixFormat) -> None:
    low, high = {8: (-127, 127), 4: (-8, 7)}[matrix.bits]
    levels = np.resize(np.arange(low, high + 1), (4, 256)).astype(np.float32)
    levels[:, :: matrix.block_size] = low  # every block reaches the end of its range
    levels[:, 1 :: matrix.block_size] = high
    weight = levels * np.float32(0.25)
    np.testing.assert_array_equal(dequantize(quantize(weight, matrix)), weight)


@every_format
def test_blocks_of_zeros_stay_zeros(matrix: MatrixFormat) -> None:
    weight = normal(3, 128)
    weight[:, 64:] = 0
    weight[1] = 0
    with np.errstate(all="raise"):
        packed = quantize(weight, matrix)
    assert (dequantize(packed)[:, 64:] == 0).all()
    assert (dequantize(packed)[1] == 0).all()


@every_format
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_extreme_magnitudes_are_rounded_as_well_as_any(matrix: MatrixFormat, scale: float) -> None:
    weight = np.clip(normal(4, 128), -3, 3)
    scaled = weight * np.float32(scale)
    tiny = quantize(weight, matrix).relative_error(weight)
    ratio = dequantize(quantize(scaled, matrix)).astype(np.float64) / scale
    assert np.linalg.norm(ratio - weight) / np.linalg.norm(weight) == pytest.approx(tiny, rel=0.05)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_named_and_refused(matrix: MatrixFormat, bad: float) -> None:
    weight = normal(5, 130)
    weight[4, 129] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3 holds NaN or infinite"):
        quantize(weight, matrix, name="layers.3")


@every_format
@pytest.mark.parametrize("columns", [1, 15, 17, 63, 65, 130])
def test_padding_to_whole_blocks_changes_no_value(matrix: MatrixFormat, columns: int) -> None:
    weight = normal(3, columns)
    padded = np.pad(weight, ((0, 0), (0, -columns % matrix.block_size)))
    np.testing.assert_array_equal(
        dequantize(quantize(weight, matrix)), dequantize(quantize(padded, matrix))[:, :columns]
    )


@every_format
def test_rows_are_rounded_alone_whatever_slices_and_threads(matrix: MatrixFormat) -> None:
    weight = normal(9000, 96)  # several slices
    whole = quantize(weight, matrix, threads=3)
    for rows in (slice(0, 1), slice(5000, 5003), slice(8999, 9000)):
        part = quantize(weight[rows], matrix, threads=1)
        for name, array in part.tensors("w").items():
            np.testing.assert_array_equal(whole.tensors("w")[name][rows], array)


def test_errors_fall_with_bits_and_the_reported_error_is_the_real_one() -> None:
    weight = normal(64, 256)
    errors = [quantize(weight, matrix).relative_error(weight) for matrix in (INT8, INT4)]
    assert errors[0] < 0.01 < errors[1] < 0.12
    expected = np.linalg.norm(dequantize(quantize(weight, INT8)) - weight) / np.linalg.norm(weight)
    assert errors[0] == pytest.approx(float(expected))
    assert quantize(np.zeros((2, 32), np.float32), INT8).relative_error(np.zeros((2, 32), np.float32)) == 0


# --- the byte layout, as ONNX Runtime computes with it ---


def run(node: onnx.NodeProto, feeds: dict[str, NDArray[Any]]) -> Float32:
    """One operator on its inputs, all of them fed."""
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
    inputs = [
        helper.make_tensor_value_info(name, types.get(array.dtype, TensorProto.INT64), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets, ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Float32 = session.run(None, feeds)[0]
    return result


@every_format
@pytest.mark.parametrize("columns", [64, 192, 100])
@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, PRODUCT_TOLERANCE), (4, ACTIVATION_TOLERANCE)])
def test_matmulnbits_multiplies_by_what_dequantize_returns(
    matrix: MatrixFormat, columns: int, accuracy_level: int, tolerance: float
) -> None:
    packed = quantize(normal(48, columns), matrix)
    x = normal(5, columns, seed=1)
    feeds = {"x": x, "data": packed.data, "scales": packed.scales}
    node = helper.make_node(
        "MatMulNBits",
        list(feeds),
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=48,
        bits=matrix.bits,
        block_size=matrix.block_size,
        accuracy_level=accuracy_level,
    )
    expected = x.astype(np.float64) @ dequantize(packed).astype(np.float64).T
    assert np.abs(run(node, feeds) - expected).max() < tolerance * np.abs(expected).max()


@every_format
@pytest.mark.parametrize("columns", [64, 192])
def test_gatherblockquantized_reads_the_same_bytes_as_rows(matrix: MatrixFormat, columns: int) -> None:
    packed = quantize(normal(48, columns), matrix)
    feeds: dict[str, NDArray[Any]] = {
        "data": packed.data.reshape(48, -1),
        "ids": np.array([[47, 0], [3, 3]], np.int64),
        "scales": packed.scales,
    }
    node = helper.make_node(
        "GatherBlockQuantized",
        list(feeds),
        ["y"],
        domain="com.microsoft",
        bits=matrix.bits,
        block_size=matrix.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_array_equal(run(node, feeds), dequantize(packed)[feeds["ids"]])


# --- formats and schemes ---


@pytest.mark.parametrize(
    ("columns", "block_size"), [(64, 64), (192, 64), (96, 32), (48, 16), (40, 64), (37, 64)]
)
def test_blocks_are_fitted_to_divide_a_row_where_they_can(columns: int, block_size: int) -> None:
    assert MatrixFormat(8, 64).fitted(columns).block_size == block_size
    assert MatrixFormat(32).fitted(columns) == MatrixFormat(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 32), "2 bits are not supported"),
        ((8, 48), "block_size is 48; it must be a power of two"),
        ((8, 8), "at least 16"),
    ],
)
def test_formats_without_a_kernel_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MatrixFormat(*arguments)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("vocabulary", [None, "float32", "int8", "int4"])
def test_schemes_survive_their_description(dtype: str, vocabulary: str | None) -> None:
    scheme = QuantizationScheme.named(dtype, vocabulary)
    assert QuantizationScheme.from_dict(scheme.to_dict()) == scheme
    assert scheme.is_float32 == (dtype == "float32" and vocabulary in (None, "float32"))
    assert scheme.format_of(EMBEDDING) is scheme.format_of(VOCABULARY) is scheme.vocabulary
    assert scheme.format_of("model.layers.0.mlp.Wi.weight") is scheme.body


def test_the_default_vocabulary_of_int4_has_8_bits_and_the_one_asked_for_has_4() -> None:
    assert QuantizationScheme.named("int4").vocabulary.bits == 8
    assert QuantizationScheme.named("int4", "int4").vocabulary.bits == 4
    assert QuantizationScheme.named("int4").name == "int4 body, int8 vocabulary"


@pytest.mark.parametrize("names", [("int3",), ("int8", "q4")])
def test_unknown_dtypes_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="choose one of float32, int8, int4"):
        QuantizationScheme.named(*names)


def test_a_scheme_of_another_version_or_damaged_is_refused() -> None:
    stored = QuantizationScheme.named("int8").to_dict()
    with pytest.raises(ConfigurationError, match=r"format version 99.*quantize. again"):
        QuantizationScheme.from_dict({**stored, "version": 99})
    bodies = (
        {"bits": 8, "shade": 1},
        {"bits": "8", "block_size": 64},
        {"bits": 8, "block_size": 64.0},
        [],
        8,
    )
    for damaged in (*({**stored, "body": body} for body in bodies), {"version": stored["version"]}):
        with pytest.raises(ConfigurationError, match="damaged"):
            QuantizationScheme.from_dict(damaged)


@pytest.mark.parametrize("part", ["body", "vocabulary"])
def test_packed_weights_with_zero_points_are_refused(part: str) -> None:
    stored = QuantizationScheme.named("int4").to_dict()
    without = {**stored, part: {**stored[part], "has_zero_points": False}}
    assert QuantizationScheme.from_dict(without) == QuantizationScheme.named("int4")
    with pytest.raises(ConfigurationError, match=r"have zero points, which are not read.*quantize. again"):
        QuantizationScheme.from_dict({**stored, part: {**stored[part], "has_zero_points": True}})


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_stored_bytes_per_weight_are_those_of_the_packed_shapes(scheme: str) -> None:
    matrix = QuantizationScheme.named(scheme).body
    packed = quantize(normal(64, 256), matrix)
    num_bytes = sum(array.nbytes for array in packed.tensors("w").values())
    assert num_bytes == matrix.bytes_per_weight * 64 * 256


def test_packed_shapes_are_the_shapes_that_packing_gives() -> None:
    architecture = tiny_architecture(hidden_size=48, num_attention_heads=1, intermediate_size=37)
    for matrix in FORMATS.values():
        scheme = QuantizationScheme(matrix, matrix)
        shapes = {
            f"{name}.{part}": array.shape
            for name, shape in fused_shapes(architecture).items()
            if len(shape) == 2
            for part, array in _packed_parts(shape, matrix).items()
        }
        described = scheme.packed_shapes(architecture)
        assert {name: described[name] for name in shapes} == shapes


def _packed_parts(shape: tuple[int, ...], matrix: MatrixFormat) -> dict[str, NDArray[Any]]:
    packed = quantize(np.ones(shape, np.float32), matrix.fitted(shape[1]))
    return {name.removeprefix("w."): array for name, array in packed.tensors("w").items()}


# --- memory ---


@pytest.mark.parametrize("matrix", [INT8, INT4], ids=["int8", "int4"])
def test_packing_a_matrix_of_the_largest_model_needs_little_beside_the_result(matrix: MatrixFormat) -> None:
    """A tenth of the rows of 1b's vocabulary: temporaries must not grow with the number of rows."""
    columns = released_architecture("1b").hidden_size
    weight = np.ones((5037, columns), np.float32)
    num_threads = threading.active_count()  # other tests may have servers that go on
    tracemalloc.start()
    packed = quantize(weight, matrix, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert threading.active_count() <= num_threads
    result = sum(array.nbytes for array in packed.tensors("w").values())
    temporaries = peak - result
    assert temporaries < weight.nbytes // 2, f"{temporaries:,} bytes for a matrix of {weight.nbytes:,}"


# --- one scale per row ---


@pytest.mark.parametrize("columns", [1, 15, 64, 130])
def test_rows_with_one_scale_keep_every_value_within_half_a_level(columns: int) -> None:
    weight = np.random.default_rng(columns).standard_normal((7, columns)).astype(np.float32)
    weight[3] = 0
    packed = quantize(weight, MatrixFormat(8, 0))
    assert packed.data.shape == (columns, 7)
    assert packed.data.dtype == np.uint8
    assert np.abs(packed.data.view(np.int8)).max() == 127
    assert (np.abs(dequantize(packed) - weight) <= packed.scales[:, None] * 0.5001).all()
    again = quantize(dequantize(packed), MatrixFormat(8, 0))
    assert np.array_equal(again.data, packed.data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_one_scale_refuse_values_that_are_not_finite(value: float) -> None:
    weight = np.ones((4, 8), np.float32)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match="layer 1 holds NaN or infinite"):
        quantize(weight, MatrixFormat(8, 0), name="layer 1")


def test_w8a8_is_for_layers_only() -> None:
    scheme = QuantizationScheme.named("w8a8")
    assert scheme.name == "w8a8 body, int8 vocabulary"
    assert QuantizationScheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(InputError, match="vocabulary_dtype is 'w8a8'; choose one of float32, int8, int4"):
        QuantizationScheme.named("int8", "w8a8")
