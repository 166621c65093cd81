"""Safetensors files: headers checked, tensors memory-mapped without a copy, new files written atomically.

The header is parsed by this module rather than by the safetensors library, so that every defect of a file is
told in full (which file, which tensor, what to do) and bfloat16 can be read without torch. It knows nothing
of models or tensor names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.atomic_files import new_file
from modernbert_decoder.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_NUMBER_LIMIT = 2**63  # shapes and offsets are 64-bit integers; nothing of this size exists
_MAX_DIMENSIONS = 32  # what every version of numpy can hold
_ALIGNMENT = 64  # of the data section in files we write: a cache line, and more than any element needs

# dtype name -> how numpy views the bytes; bfloat16, unknown to numpy, is viewed as its 16 raw bits
_STORED_AS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
}
_NAME_OF_DTYPE = {np.dtype(code): name for name, code in _STORED_AS.items() if name != "BF16"}
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header; `begin` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open, memory-mapped file whose header was found to be sound.

    Attributes:
        path: the file.
        tensors: tensor name -> entry, in the header's order.
        metadata: the header's free text entries.
        size_bytes, modified_ns: of the file when it was opened, in bytes and nanoseconds.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` and check it: header, known dtypes, sizes, no overlap, no gap, nothing cut off.

        Raises:
            CheckpointError: the file cannot be read, or is truncated, corrupt or not a safetensors file.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                self.size_bytes, self.modified_ns = status.st_size, status.st_mtime_ns
                start = file.read(64)
                _check_start(path, start, self.size_bytes)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        data_begin = 8 + int.from_bytes(start[:8], "little")
        header = _parse_header(path, self._map[8:data_begin])
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.tensors: dict[str, StoredTensor] = {
            name: _parse_entry(path, name, entry, data_begin) for name, entry in header.items()
        }
        _check_layout(path, self.tensors, data_begin, self.size_bytes)

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored (bfloat16 as uint16), a read-only view of the mapped file."""
        tensor = self.tensors[name]
        dtype = np.dtype(_STORED_AS[tensor.dtype])
        if tensor.begin == tensor.end:
            return np.empty(tensor.shape, dtype)
        count = math.prod(tensor.shape)
        return np.frombuffer(self._map, dtype, count, tensor.begin).reshape(tensor.shape)

    def as_float32(self, name: str) -> NDArray[np.float32]:
        """The tensor as float32: the read-only mapped view itself when it is stored so, else a new array.

        Raises:
            CheckpointError: the tensor is not of a floating-point type, or holds NaN or infinity.
        """
        dtype = self.tensors[name].dtype
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} is stored as {dtype}, not as floating point")
        raw = self.raw(name)
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is reported below
            values = bfloat16_to_float32(raw) if dtype == "BF16" else np.require(raw, np.float32, "A")
        if not np.isfinite(values).all():
            num_bad = int(values.size - np.count_nonzero(np.isfinite(values)))
            raise CheckpointError(
                f"{self.path}: tensor {name} holds {num_bad:,} values of {values.size:,} that are NaN or "
                "infinite. The training run diverged or the file is damaged; use an earlier checkpoint or "
                "download it again"
            )
        return values


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact conversion: bfloat16 is the upper half of a float32."""
    widened = bits.astype(np.uint32)
    widened <<= np.uint32(16)
    return widened.view(np.float32)


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when its turn to be written comes, and dropped afterwards."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Mapping[str, NDArray[Any] | LazyArray],
    metadata: Mapping[str, str] | None = None,
    *,
    bfloat16: Collection[str] = (),
) -> None:
    """Write a file that appears under `path` whole or not at all; arrays are streamed, not copied.

    The largest element types come first, and the data begin at a multiple of 64 bytes, so that every tensor
    is aligned when mapped.

    Args:
        path: the file.
        tensors: tensor name -> array, or how to make it.
        metadata: free text entries for the header.
        bfloat16: names of the uint16 arrays that hold bfloat16 values, as `SafetensorsFile.raw` gives them.

    Raises:
        CheckpointError: the file cannot be written; nothing is left behind.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        array = tensors[name]
        dtype = "BF16" if name in bfloat16 else _NAME_OF_DTYPE.get(array.dtype.newbyteorder("<"))
        assert dtype is not None, f"{name}: {array.dtype} has no name in a safetensors header"
        assert dtype != "BF16" or array.dtype == np.uint16, f"{name}: {array.dtype} is not bfloat16 bits"
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    with new_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in ordered:
            stored = tensors[name]
            array = stored.make() if isinstance(stored, LazyArray) else stored
            assert (array.shape, array.dtype) == (stored.shape, stored.dtype), name
            little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(little_endian.reshape(-1).view(np.uint8).data)


def _check_start(path: Path, start: bytes, size_bytes: int) -> None:
    """Reject files whose first bytes already show that they are not, or not all of, a safetensors file."""
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` in its folder"
        )
    header_bytes = int.from_bytes(start[:8], "little")
    if size_bytes < 8:
        raise _damaged(path, f"it is only {size_bytes} bytes long")
    if header_bytes > _MAX_HEADER_BYTES or 8 + header_bytes > size_bytes:
        raise _damaged(
            path,
            f"its first 8 bytes announce a header of {header_bytes:,} bytes, but the file has "
            f"{size_bytes:,}; it is cut off or not a safetensors file",
        )


def _parse_header(path: Path, encoded: bytes) -> dict[str, Any]:
    """The header's JSON object; a name that occurs twice, of which a parser would drop one, is refused."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            raise _damaged(path, f"its header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return entries

    try:
        header = json.loads(encoded.decode(), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # undecodable bytes and numbers of endless digits included
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _parse_entry(path: Path, name: str, entry: Any, data_begin: int) -> StoredTensor:
    """One header entry, its dtype known and its number of bytes equal to what dtype and shape ask for."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < _NUMBER_LIMIT for n in numbers):
            raise TypeError
        if len(shape) > _MAX_DIMENSIONS or math.prod(shape) >= _NUMBER_LIMIT:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        what = f"the header entry of tensor {name:.200} is malformed: {entry!r:.200}"
        raise _damaged(path, what) from error
    if dtype not in _STORED_AS:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype!r}, which is not supported; save the model again in "
            "float32, float16 or bfloat16, or download the file again if it should be one of these"
        )
    expected_bytes = math.prod(shape) * np.dtype(_STORED_AS[dtype]).itemsize
    if end - begin != expected_bytes:
        raise _damaged(
            path,
            f"tensor {name} of shape {shape} and dtype {dtype} needs {expected_bytes:,} bytes, "
            f"but its offsets {begin} to {end} give {end - begin:,}",
        )
    return StoredTensor(dtype, shape, data_begin + begin, data_begin + end)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data_begin: int, size_bytes: int) -> None:
    """The tensors must cover the data section without overlap or gap, up to the last byte of the file."""
    position, previous = data_begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            relation = "overlaps" if tensor.begin < position else "leaves a gap behind"
            raise _damaged(
                path,
                f"tensor {name} at byte {tensor.begin:,} {relation} {previous}, which ends at {position:,}",
            )
        position, previous = tensor.end, name
    if position > size_bytes:
        num_cut_off = sum(tensor.end > size_bytes for tensor in tensors.values())
        raise _damaged(
            path,
            f"it is cut off: {size_bytes:,} bytes of {position:,} are there, and {num_cut_off} of "
            f"{len(tensors)} tensors are incomplete",
        )
    if position < size_bytes:
        raise _damaged(
            path, f"{size_bytes - position:,} bytes follow the last tensor, which ends at byte {position:,}"
        )


def _damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that only a fresh copy can put right."""
    return CheckpointError(f"{path} is damaged: {what}. Download or copy it again")
