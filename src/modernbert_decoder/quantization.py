"""Block quantization of weight matrices: which matrices, how many bits, packing, unpacking and the error.

A matrix (N, K) is cut along K into blocks; each block is stored as small integers and one float32 scale.
The byte layout is the one that ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` share, so a tied
embedding is stored once. This module knows arrays and tensor names; it knows nothing of files or of the
runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import CLASSIFIER, EMBEDDING, VOCABULARY
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

DTYPES: Final = ("float32", "int8", "int4", "w8a8")
VOCABULARY_DTYPES: Final = ("float32", "int8", "int4")
# The folder format this version writes and reads; a change of layout, rounding or names raises it.
FORMAT_VERSION: Final = 1
# Rows handled at a time: the temporaries of one slice (about 1 MB) stay in a core's cache.
_SLICE_VALUES: Final = 1 << 18
_SMALLEST_SCALE: Final = np.finfo(np.float32).tiny
# Fractions of the full range tried as the scale of a 4-bit block; the one with the least squared error wins.
_SCALE_FRACTIONS: Final = (1.0, 0.96, 0.92, 0.88, 0.84, 0.78)


@dataclass(frozen=True)
class MatrixFormat:
    """How one matrix is stored: `bits` (4, 8 or 32) and `block_size` values per scale.

    8 bits with block size 0 have one scale per output row, and products of whole rows of integers: the
    activations are rounded to 8 bits as well, each token with a scale of its own.
    """

    bits: int
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 32):
            raise ConfigurationError(f"weights of {self.bits} bits are not supported; use 4, 8 or 32")
        power_of_two = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        if self.bits < 32 and not power_of_two and not self.is_per_row:
            raise ConfigurationError(
                f"block_size is {self.block_size}; it must be a power of two and at least 16, for instance 64"
            )

    def fitted(self, columns: int) -> MatrixFormat:
        """This format with blocks that divide a row of `columns` values, where blocks of 16 or more can.

        >>> MatrixFormat(8, 128).fitted(192).block_size
        64
        """
        largest_power_of_two = columns & -columns
        if self.bits == 32 or self.is_per_row or largest_power_of_two < 16:
            return self
        return replace(self, block_size=min(self.block_size, largest_power_of_two))

    @property
    def is_per_row(self) -> bool:
        """Whether there is one scale for each row of the matrix, and integers are multiplied."""
        return self.bits == 8 and self.block_size == 0

    def is_like(self, other: MatrixFormat) -> bool:
        """Whether both have one name, block sizes aside."""
        return (self.bits, self.is_per_row) == (other.bits, other.is_per_row)

    @property
    def bytes_per_weight(self) -> float:
        """Bytes read per weight, scales included; one scale for a whole row is not counted."""
        if self.bits == 32 or self.is_per_row:
            return self.bits / 8
        return self.bits / 8 + 4 / self.block_size


@dataclass(frozen=True)
class QuantizationScheme:
    """The formats of the layers' matrices and of the embedding and vocabulary matrix."""

    body: MatrixFormat
    vocabulary: MatrixFormat

    @classmethod
    def named(
        cls, dtype: str, vocabulary_dtype: str | None = None, *, name: str = "dtype"
    ) -> QuantizationScheme:
        """The scheme of a `dtype` as users write it; `vocabulary_dtype` overrides that matrix's default.

        `name` is what the user calls the former.

        Raises:
            InputError: an unknown name.
        """
        for what, value, choices in (
            (name, dtype, DTYPES),
            ("vocabulary_dtype", vocabulary_dtype, VOCABULARY_DTYPES),
        ):
            if value is not None and value not in choices:
                raise InputError(f"{what} is {value!r}; choose one of {', '.join(choices)}")
        if vocabulary_dtype is None:
            return cls(_BODY[dtype], _VOCABULARY[dtype])
        return cls(_BODY[dtype], _CHOSEN_VOCABULARY[vocabulary_dtype])

    @property
    def is_float32(self) -> bool:
        """Whether nothing is quantized."""
        return self.body.bits == 32 and self.vocabulary.bits == 32

    @property
    def body_name(self) -> str:
        """The format of the layers' matrices, as users write it."""
        return _format_name(self.body)

    @property
    def name(self) -> str:
        """`int8`, or `int4 body, int8 vocabulary` where the two differ."""
        body, vocabulary = _format_name(self.body), _format_name(self.vocabulary)
        return body if body == vocabulary else f"{body} body, {vocabulary} vocabulary"

    def to_dict(self) -> dict[str, Any]:
        """What a packed folder keeps of it in `config.json`."""
        return {"version": FORMAT_VERSION, "body": asdict(self.body), "vocabulary": asdict(self.vocabulary)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> QuantizationScheme:
        """The inverse of `to_dict`.

        Raises:
            ConfigurationError: written by another version, or damaged.
        """
        if stored.get("version") != FORMAT_VERSION:
            raise ConfigurationError(
                f"the packed weights have format version {stored.get('version')!r} and this version reads "
                f"{FORMAT_VERSION}; run `mbd quantize` again on the original checkpoint"
            )
        try:
            return cls(_stored_format(stored["body"]), _stored_format(stored["vocabulary"]))
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"the description of the packed weights is damaged ({error}); run `mbd quantize` again"
            ) from error

    def format_of(self, name: str) -> MatrixFormat:
        """The format of a matrix, by its name in the checkpoint."""
        if name == CLASSIFIER:  # a few rows, whose exactness costs nothing
            return MatrixFormat(32)
        return self.vocabulary if name in (EMBEDDING, VOCABULARY) else self.body

    def packed_shapes(self, architecture: DecoderArchitecture) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of a packed checkpoint of that architecture.

        Query, key and value weights lie in one matrix `attn.Wqkv.weight`; a matrix `X.weight` is stored as
        `X.weight.data` and `X.weight.scales`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in fused_shapes(architecture).items():
            if len(shape) == 1:
                shapes[name] = shape
                continue
            matrix = self.format_of(name).fitted(shape[1])
            if matrix.bits == 32:
                shapes[name] = shape
            else:
                shapes.update(_packed_shapes(name, (shape[0], shape[1]), matrix))
        return shapes


# Blocks as long as the measured perplexity allows: every scale less is time won (docs/benchmarks.md).
_BODY: Final = {
    "float32": MatrixFormat(32),
    "int8": MatrixFormat(8, 256),
    "int4": MatrixFormat(4, 128),
    "w8a8": MatrixFormat(8, 0),
}
# A 4-bit vocabulary costs as much perplexity as the whole 4-bit body: int4 keeps it in 8 bits by default.
# The embedding is looked up in blocks, so w8a8 keeps that matrix in them, too.
_VOCABULARY: Final = {**_BODY, "int4": _BODY["int8"], "w8a8": _BODY["int8"]}
# Asked for by name, it is the pure 4-bit model that compares with llama.cpp's Q4_0, at the same 4.5 bits.
_CHOSEN_VOCABULARY: Final = {**_BODY, "int4": MatrixFormat(4, 64)}


def _stored_format(stored: Any) -> MatrixFormat:
    """A format from `config.json`; folders of older versions say there that they have no zero points."""
    values = dict(stored)
    if values.pop("has_zero_points", False):
        raise ConfigurationError(
            "the packed weights have zero points, which are not read here; run `mbd quantize` again on the "
            "original checkpoint"
        )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r} instead of an integer")
    return MatrixFormat(**values)


def _format_name(matrix: MatrixFormat) -> str:
    if matrix.is_per_row:
        return "w8a8"
    return "float32" if matrix.bits == 32 else f"int{matrix.bits}"


def _packed_shapes(name: str, shape: tuple[int, int], matrix: MatrixFormat) -> dict[str, tuple[int, ...]]:
    rows, columns = shape
    if matrix.is_per_row:
        return {f"{name}.data": (columns, rows), f"{name}.scales": (rows,)}
    blocks = -(-columns // matrix.block_size)
    return {
        f"{name}.data": (rows, blocks, matrix.block_size * matrix.bits // 8),
        f"{name}.scales": (rows, blocks),
    }


def fused_shapes(architecture: DecoderArchitecture) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors with query, key and value joined: the tensors the engine computes with."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in architecture.tensor_shapes().items():
        if ".attn.q_proj." in name:
            shapes[name.replace("q_proj", "Wqkv")] = (3 * shape[0], *shape[1:])
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            shapes[name] = shape
    return shapes


def fused_tensor(name: str, tensor: Callable[[str], Float32]) -> Float32:
    """The tensor `name` of `fused_shapes`, read by `tensor` from a checkpoint that keeps q, k and v apart."""
    if ".attn.Wqkv." not in name:
        return tensor(name)
    return np.concatenate([tensor(name.replace("Wqkv", f"{part}_proj")) for part in "qkv"])


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix (N, K).

    Attributes:
        shape: N, K.
        format: bits and blocks.
        data: the levels, (N, blocks, bytes of a block); with one scale per row (K, N), signed ones as the
            bytes they are.
        scales: one per block, (N, blocks), or per row, (N,).
    """

    shape: tuple[int, int]
    format: MatrixFormat
    data: UInt8
    scales: Float32

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays under the names of a packed folder."""
        return {f"{name}.data": self.data, f"{name}.scales": self.scales}

    def relative_error(self, weight: Float32) -> float:
        """Root mean square of (stored - original) divided by the root mean square of the original."""
        norm = float(np.linalg.norm(weight))
        return float(np.linalg.norm(dequantize(self) - weight)) / norm if norm else 0.0


def quantize(
    weight: Float32, matrix: MatrixFormat, *, name: str = "weight", threads: int = 2
) -> PackedMatrix:
    """Rounds `weight` (N, K) to `matrix`; K is padded with zeros to whole blocks.

    8 bits: scale = largest magnitude / 127, stored with an offset of 128, or signed where a row has one
    scale. 4 bits: the largest value of the block lies on -8, and smaller scales are tried.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.

    >>> packed = quantize(np.array([[1.0, -2.0] + [0.0] * 14], np.float32), MatrixFormat(8, 16))
    >>> packed.data[0, 0, :3].tolist(), round(float(packed.scales[0, 0]), 6)
    ([192, 1, 128], 0.015748)
    """
    if matrix.is_per_row:
        return _quantize_rows(weight, matrix, name=name)
    rows, columns = weight.shape
    blocks = -(-columns // matrix.block_size)
    data = np.empty((rows, blocks, matrix.block_size * matrix.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    step = max(1, _SLICE_VALUES // (blocks * matrix.block_size))

    def pack(start: int) -> None:
        part = slice(start, min(start + step, rows))
        values = _blocks(weight[part], matrix.block_size)
        # Infinities are reported from the scales below, by name, and not as warnings of the arithmetic.
        with np.errstate(invalid="ignore", over="ignore"):
            data[part], scales[part] = _pack_int8(values) if matrix.bits == 8 else _pack_int4(values)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack, range(0, rows, step)))
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    return PackedMatrix((rows, columns), matrix, data, scales)


def _quantize_rows(weight: Float32, matrix: MatrixFormat, *, name: str) -> PackedMatrix:
    """One scale per row, and the levels turned (K, N), as integer products want them."""
    rows, columns = weight.shape
    with np.errstate(invalid="ignore", over="ignore"):
        scales = np.maximum(weight.max(1), -weight.min(1)) / np.float32(127)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        levels = np.rint(weight * _inverse(scales)[:, None]).astype(np.int8)
    return PackedMatrix((rows, columns), matrix, np.ascontiguousarray(levels.T).view(np.uint8), scales)


def dequantize(packed: PackedMatrix) -> Float32:
    """The matrix (N, K) that the packed bytes stand for."""
    if packed.format.is_per_row:
        levels = packed.data.view(np.int8).astype(np.float32)
        return np.ascontiguousarray((levels * packed.scales).T)
    if packed.format.bits == 8:
        values = packed.data.astype(np.float32) - 128
    else:
        values = _unpack_nibbles(packed.data).astype(np.float32) - 8
    values *= packed.scales[..., None]
    rows, columns = packed.shape
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns])


def _blocks(weight: Float32, block_size: int) -> Float32:
    padded = _pad_last(np.asarray(weight, np.float32), block_size)
    return padded.reshape(len(weight), -1, block_size)


def _pad_last(array: NDArray[Any], multiple: int) -> NDArray[Any]:
    missing = -array.shape[-1] % multiple
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def _inverse(scales: Float32) -> Float32:
    """1 / scale, and 0 where that is no float32: such a block is stored as zeros."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=np.abs(scales) >= _SMALLEST_SCALE)


def _pack_int8(values: Float32) -> tuple[UInt8, Float32]:
    scales = np.maximum(values.max(2), -values.min(2)) / np.float32(127)
    levels = np.rint(values * _inverse(scales)[..., None])
    levels += 128
    return _as_bytes(levels), scales


def _as_bytes(levels: Float32) -> UInt8:
    """Levels to bytes; NaN, which the caller reports from the scales, becomes some byte."""
    return levels.astype(np.uint8)


def _pack_int4(values: Float32) -> tuple[UInt8, Float32]:
    largest, smallest = values.max(2), values.min(2)
    # The value of largest magnitude lies on -8, the end of the range that has one level more.
    extreme = np.where(largest > -smallest, largest, smallest)
    # In units of the extreme, so that squared errors neither overflow nor vanish.
    relative = values * _inverse(extreme)[..., None]
    best_levels: Float32 = np.zeros_like(values)
    best_fractions = np.ones_like(extreme)
    best_errors = np.full(extreme.shape, np.inf, np.float32)
    for fraction in _SCALE_FRACTIONS:
        levels = np.rint(relative * np.float32(-8 / fraction))
        np.clip(levels, -8, 7, out=levels)
        errors = np.square(levels * np.float32(-fraction / 8) - relative).sum(2)
        better = errors < best_errors
        best_levels = np.where(better[..., None], levels, best_levels)
        best_fractions = np.where(better, np.float32(fraction), best_fractions)
        best_errors = np.where(better, errors, best_errors)
    return _pack_nibbles(_as_bytes(best_levels + 8)), extreme * best_fractions / np.float32(-8)


def _pack_nibbles(levels: UInt8) -> UInt8:
    """Pairs along the last axis to bytes, the first of each pair in the low half.

    >>> _pack_nibbles(np.array([[1, 2, 15, 0]], np.uint8)).tolist()
    [[33, 15]]
    """
    packed: UInt8 = levels[..., 0::2] | (levels[..., 1::2] << np.uint8(4))
    return packed


def _unpack_nibbles(packed: UInt8) -> UInt8:
    levels = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    levels[..., 0::2] = packed & 15
    levels[..., 1::2] = packed >> 4
    return levels
