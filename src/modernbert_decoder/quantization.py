"""Block quantization of weight matrices: which matrices, how many bits, packing, unpacking and the error.

A matrix (N, K) is cut along K into blocks; each block is stored as small integers and one float32 scale
(and, when asymmetric, one zero point). The byte layout is the one that ONNX Runtime's `MatMulNBits` and
`GatherBlockQuantized` share, so a tied embedding is stored once. This module knows arrays and tensor names;
it knows nothing of files or of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

DTYPES: Final = ("float32", "int8", "int4")
# The folder format this version writes and reads; a change of layout, rounding or names raises it.
FORMAT_VERSION: Final = 1
# Rows handled at a time: the temporaries of one slice (about 1 MB) stay in a core's cache.
_SLICE_VALUES: Final = 1 << 18
_SMALLEST_SCALE: Final = np.finfo(np.float32).tiny
# Fractions of the full range tried as the scale of a 4-bit block; the one with the least squared error wins.
_SCALE_FRACTIONS: Final = (1.0, 0.96, 0.92, 0.88, 0.84, 0.78)


@dataclass(frozen=True)
class MatrixFormat:
    """How one matrix is stored: `bits` (4, 8 or 32), `block_size` values per scale, zero points or not."""

    bits: int
    block_size: int = 0
    has_zero_points: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 32):
            raise ConfigurationError(f"weights of {self.bits} bits are not supported; use 4, 8 or 32")
        power_of_two = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        if self.bits < 32 and not power_of_two:
            raise ConfigurationError(
                f"block_size is {self.block_size}; it must be a power of two and at least 16, for instance 64"
            )
        if self.bits != 4 and self.has_zero_points:
            raise ConfigurationError(f"zero points exist for 4-bit weights only, not for {self.bits} bits")

    def fitted(self, columns: int) -> MatrixFormat:
        """This format with blocks that divide a row of `columns` values, where blocks of 16 or more can.

        >>> MatrixFormat(8, 128).fitted(192).block_size
        64
        """
        largest_power_of_two = columns & -columns
        if self.bits == 32 or largest_power_of_two < 16:
            return self
        return replace(self, block_size=min(self.block_size, largest_power_of_two))

    @property
    def bytes_per_weight(self) -> float:
        """Bytes read per weight, scales and zero points included."""
        if self.bits == 32:
            return 4.0
        return self.bits / 8 + (4 + self.has_zero_points / 2) / self.block_size


@dataclass(frozen=True)
class QuantizationScheme:
    """The formats of the layers' matrices and of the embedding and vocabulary matrix."""

    body: MatrixFormat
    vocabulary: MatrixFormat

    @classmethod
    def named(cls, dtype: str, vocabulary_dtype: str | None = None) -> QuantizationScheme:
        """The scheme of a `dtype` as users write it; `vocabulary_dtype` overrides that matrix's default.

        Raises:
            InputError: an unknown name.
        """
        for what, value in (("dtype", dtype), ("vocabulary_dtype", vocabulary_dtype)):
            if value is not None and value not in DTYPES:
                raise InputError(f"{what} is {value!r}; choose one of {', '.join(DTYPES)}")
        if vocabulary_dtype is None:
            return cls(_BODY[dtype], _VOCABULARY[dtype])
        return cls(_BODY[dtype], _CHOSEN_VOCABULARY[vocabulary_dtype])

    @property
    def is_float32(self) -> bool:
        """Whether nothing is quantized."""
        return self.body.bits == 32 and self.vocabulary.bits == 32

    @property
    def name(self) -> str:
        """`int8`, or `int4 body, int8 vocabulary` where the two differ."""
        body, vocabulary = _bits_name(self.body.bits), _bits_name(self.vocabulary.bits)
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
            return cls(MatrixFormat(**stored["body"]), MatrixFormat(**stored["vocabulary"]))
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"the description of the packed weights is damaged ({error}); run `mbd quantize` again"
            ) from error

    def format_of(self, name: str) -> MatrixFormat:
        """The format of a matrix, by its name in the checkpoint."""
        return self.vocabulary if name in (EMBEDDING, VOCABULARY) else self.body

    def packed_shapes(self, architecture: DecoderArchitecture) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of a packed checkpoint of that architecture.

        Query, key and value weights lie in one matrix `attn.Wqkv.weight`; a matrix `X.weight` is stored as
        `X.weight.data`, `X.weight.scales` and, with zero points, `X.weight.zero_points`.
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
    "int8": MatrixFormat(8, 128),
    "int4": MatrixFormat(4, 128),
}
# A 4-bit vocabulary costs as much perplexity as the whole 4-bit body: int4 keeps it in 8 bits by default.
_VOCABULARY: Final = {**_BODY, "int4": MatrixFormat(8, 128)}
# Asked for by name, it is the pure 4-bit model that compares with llama.cpp's Q4_0, at the same 4.5 bits.
_CHOSEN_VOCABULARY: Final = {**_BODY, "int4": MatrixFormat(4, 64)}


def _bits_name(bits: int) -> str:
    return "float32" if bits == 32 else f"int{bits}"


def _packed_shapes(name: str, shape: tuple[int, int], matrix: MatrixFormat) -> dict[str, tuple[int, ...]]:
    rows, columns = shape
    blocks = -(-columns // matrix.block_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.data": (rows, blocks, matrix.block_size * matrix.bits // 8),
        f"{name}.scales": (rows, blocks),
    }
    if matrix.has_zero_points:
        shapes[f"{name}.zero_points"] = (rows, -(-blocks // 2))
    return shapes


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
        data: the levels, (N, blocks, bytes of a block).
        scales: one per block, (N, blocks).
        zero_points: two per byte, (N, blocks / 2), or None.
    """

    shape: tuple[int, int]
    format: MatrixFormat
    data: UInt8
    scales: Float32
    zero_points: UInt8 | None

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays under the names of a packed folder."""
        tensors: dict[str, NDArray[Any]] = {f"{name}.data": self.data, f"{name}.scales": self.scales}
        if self.zero_points is not None:
            tensors[f"{name}.zero_points"] = self.zero_points
        return tensors

    def relative_error(self, weight: Float32) -> float:
        """Root mean square of (stored - original) divided by the root mean square of the original."""
        norm = float(np.linalg.norm(weight))
        return float(np.linalg.norm(dequantize(self) - weight)) / norm if norm else 0.0


def quantize(
    weight: Float32, matrix: MatrixFormat, *, name: str = "weight", threads: int = 2
) -> PackedMatrix:
    """Rounds `weight` (N, K) to `matrix`; K is padded with zeros to whole blocks.

    8 bits: scale = largest magnitude / 127, stored with an offset of 128. 4 bits: the largest value of the
    block lies on -8, and smaller scales are tried; with zero points the block's range is mapped to 0..15.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.

    >>> packed = quantize(np.array([[1.0, -2.0] + [0.0] * 14], np.float32), MatrixFormat(8, 16))
    >>> packed.data[0, 0, :3].tolist(), round(float(packed.scales[0, 0]), 6)
    ([192, 1, 128], 0.015748)
    """
    rows, columns = weight.shape
    blocks = -(-columns // matrix.block_size)
    data = np.empty((rows, blocks, matrix.block_size * matrix.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    offsets = np.empty((rows, blocks), np.uint8) if matrix.has_zero_points else None
    step = max(1, _SLICE_VALUES // (blocks * matrix.block_size))

    def pack(start: int) -> None:
        part = slice(start, min(start + step, rows))
        values = _blocks(weight[part], matrix.block_size)
        # Infinities are reported from the scales below, by name, and not as warnings of the arithmetic.
        with np.errstate(invalid="ignore", over="ignore"):
            if matrix.bits == 8:
                data[part], scales[part] = _pack_int8(values)
            elif offsets is None:
                data[part], scales[part] = _pack_int4(values)
            else:
                data[part], scales[part], offsets[part] = _pack_int4_with_zero_points(values)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack, range(0, rows, step)))
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    zero_points = None if offsets is None else _pack_nibbles(_pad_last(offsets, 2))
    return PackedMatrix((rows, columns), matrix, data, scales, zero_points)


def dequantize(packed: PackedMatrix) -> Float32:
    """The matrix (N, K) that the packed bytes stand for."""
    if packed.format.bits == 8:
        values = packed.data.astype(np.float32) - 128
    else:
        values = _unpack_nibbles(packed.data).astype(np.float32)
        if packed.zero_points is None:
            values -= 8
        else:
            offsets = _unpack_nibbles(packed.zero_points)[:, : packed.scales.shape[1]]
            values -= offsets.astype(np.float32)[..., None]
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


def _pack_int4_with_zero_points(values: Float32) -> tuple[UInt8, Float32, UInt8]:
    # The range always includes 0, so that 0 is stored exactly.
    largest, smallest = np.maximum(values.max(2), 0), np.minimum(values.min(2), 0)
    scales = (largest - smallest) / np.float32(15)
    inverse = _inverse(scales)
    offsets = np.clip(np.rint(-smallest * inverse), 0, 15)
    levels = np.clip(np.rint(values * inverse[..., None]) + offsets[..., None], 0, 15)
    return _pack_nibbles(_as_bytes(levels)), scales, _as_bytes(offsets)


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
