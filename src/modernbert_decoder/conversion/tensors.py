"""The tensors of a checkpoint by format: their names, whether they fit, and how each one is made from
another format's.

Names in plain spelling are the decoder's (`lm_head`, not `head`), with `Wqkv` fused or split as the format
has it. Nothing is computed: values are moved as stored. Must not know about configuration files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import canonical_names, drop_tied_copy
from modernbert_decoder.conversion.kinds import CheckpointKind
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.errors import CheckpointError
from modernbert_decoder.quantization import fused_shapes
from modernbert_decoder.safetensors_files import FLOAT_DTYPES, LazyArray, SafetensorsFile, StoredTensor

_Stored = dict[str, tuple[SafetensorsFile, str]]  # name -> (file, the name it has there)

# (beginning in plain spelling, beginning in the format), the first that fits
_BEGINNINGS: Final[Mapping[CheckpointKind, tuple[tuple[str, str], ...]]] = {
    CheckpointKind.DECODER: (),
    CheckpointKind.ENCODER: (("lm_head.", "head."),),
    CheckpointKind.FLEXBERT: (
        ("lm_head.", "head."),
        ("model.layers.", "bert.encoder.layers."),
        ("model.", "bert."),
    ),
}
_PART: Final = re.compile(r"\.attn\.([qkv])_proj\.")
_FUSED: Final = ".attn.Wqkv."
_LAYER: Final = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def spelled(name: str, kind: CheckpointKind) -> str:
    """A plain name as the format spells it.

    >>> spelled("model.layers.3.attn.Wqkv.weight", CheckpointKind.FLEXBERT)
    'bert.encoder.layers.3.attn.Wqkv.weight'
    """
    for plain, own in _BEGINNINGS[kind]:
        if name.startswith(plain):
            return own + name.removeprefix(plain)
    return name


def plain_shapes(architecture: DecoderArchitecture, kind: CheckpointKind) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of the tensors that a checkpoint of this format holds."""
    return architecture.tensor_shapes() if kind is CheckpointKind.DECODER else fused_shapes(architecture)


@dataclass(frozen=True)
class SourceTensors:
    """The tensors of a checkpoint, known to fit its configuration.

    Attributes:
        kind: their format.
        tensors: plain name -> file and the name there.
        is_bare: whether the names lack `model.`, as those of a model saved without a head do.
        num_dropped: redundant copies of a tied embedding that were left out.
    """

    kind: CheckpointKind
    tensors: Mapping[str, tuple[SafetensorsFile, str]]
    is_bare: bool
    num_dropped: int

    def raw(self, name: str) -> NDArray[Any]:
        """As stored (bfloat16 as uint16), a read-only view of the mapped file."""
        file, stored_name = self.tensors[name]
        return file.raw(stored_name)

    def dtype(self, name: str) -> str:
        """The type it is stored as: "F32", "F16", "BF16" or "F64"."""
        file, stored_name = self.tensors[name]
        return file.tensors[stored_name].dtype


def read_names(files: Iterable[SafetensorsFile], kind: CheckpointKind) -> _Stored:
    """Every tensor under the name its format gives it: without the wrapper's `model.` of the trainer, with
    the `model.` that a bare model leaves out.
    """
    stored = canonical_names(files)
    if kind is CheckpointKind.FLEXBERT and all(name.startswith("model.") for name in stored):
        return {name.removeprefix("model."): place for name, place in stored.items()}
    return stored


def num_embeddings(stored: _Stored, kind: CheckpointKind) -> int | None:
    """Rows of the embedding that is there, if it is."""
    place = stored.get(spelled(EMBEDDING, kind))
    shape = place[0].tensors[place[1]].shape if place else ()
    return shape[0] if shape else None


def fit(
    stored: _Stored, kind: CheckpointKind, architecture: DecoderArchitecture, *, folder: Path
) -> SourceTensors:
    """Compares the tensors that are there with those the configuration asks for.

    Raises:
        CheckpointError: some are missing, unexpected, misshapen or not floating point (all in one error), or
            a copy of the tied embedding differs from it.
    """
    shapes = plain_shapes(architecture, kind)
    own_names = {spelled(name, kind): name for name in shapes}
    tensors = {name: stored[own] for own, name in own_names.items() if own in stored}
    unexpected = {name: place for name, place in stored.items() if name not in own_names}
    num_dropped = _drop_copy(unexpected, tensors, architecture)
    problems = {
        "missing": [f"{own} {shapes[name]}" for own, name in own_names.items() if name not in tensors],
        "unexpected": [_described(name, place) for name, place in unexpected.items()],
        **_unusable(tensors, shapes, kind),
    }
    _raise_for(problems, folder, kind, architecture)
    is_bare = kind is not CheckpointKind.FLEXBERT and any(name != place[1] for name, place in stored.items())
    return SourceTensors(kind, tensors, is_bare=is_bare, num_dropped=num_dropped)


def _drop_copy(unexpected: _Stored, tensors: _Stored, architecture: DecoderArchitecture) -> int:
    """Takes a `decoder.weight` that repeats a tied embedding off the list; returns how many that were."""
    if VOCABULARY not in unexpected or EMBEDDING not in tensors:
        return 0
    pair = {EMBEDDING: tensors[EMBEDDING], VOCABULARY: unexpected[VOCABULARY]}
    drop_tied_copy(pair, architecture)
    if VOCABULARY in pair:  # of another shape, or the model has no head
        return 0
    del unexpected[VOCABULARY]
    return 1


def _unusable(
    tensors: _Stored, shapes: Mapping[str, tuple[int, ...]], kind: CheckpointKind
) -> dict[str, list[str]]:
    """What is wrong with tensors that are there and expected."""
    found = {name: file.tensors[stored_name] for name, (file, stored_name) in tensors.items()}
    return {
        "misshapen": [
            f"{spelled(name, kind)}: expected {_expected(name, shapes[name])}, found {tensor.shape}"
            for name, tensor in found.items()
            if tensor.shape != shapes[name]
        ],
        "not floating point": [
            f"{spelled(name, kind)}: {tensor.dtype}"
            for name, tensor in found.items()
            if tensor.dtype not in FLOAT_DTYPES
        ],
        "of different types, which cannot be joined": [
            f"{name}: {', '.join(dtypes)}"
            for name, dtypes in _part_dtypes(found).items()
            if len(set(dtypes)) > 1
        ],
    }


def _described(name: str, place: tuple[SafetensorsFile, str]) -> str:
    file, stored_name = place
    return f"{name} {file.tensors[stored_name].shape}"


def _expected(name: str, shape: tuple[int, ...]) -> str:
    return f"{shape} (a third each for q, k and v)" if _FUSED in name else f"{shape}"


def _part_dtypes(found: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """The types of q, k and v of each layer's weight and bias, by the name of what joins them."""
    dtypes: dict[str, list[str]] = {}
    for name, tensor in found.items():
        if _PART.search(name):
            dtypes.setdefault(_PART.sub(_FUSED, name), []).append(tensor.dtype)
    return dtypes


def _raise_for(
    problems: Mapping[str, list[str]], folder: Path, kind: CheckpointKind, architecture: DecoderArchitecture
) -> None:
    lines = [f"  {len(entries)} {what}: {_grouped(entries)}" for what, entries in problems.items() if entries]
    if not lines:
        return
    raise CheckpointError(
        f"the weights in {folder} do not fit its config.json ({kind}, {architecture.num_hidden_layers} "
        f"layers, hidden size {architecture.hidden_size}, vocabulary {architecture.vocab_size}):\n"
        + "\n".join(lines)
        + "\nCheck that both belong to the same model and that config.json states its sizes and biases"
    )


def _grouped(entries: Iterable[str]) -> str:
    """All entries; those that differ in the number of the layer only are written as one.

    >>> _grouped(["a.layers.0.b", "a.layers.1.b", "a.layers.2.b", "a.layers.4.b", "c"])
    'a.layers.{0-2,4}.b, c'
    """
    layers: dict[str, list[int]] = {}
    for entry in entries:
        number = _LAYER.search(entry)
        layers.setdefault(_LAYER.sub("{}", entry, count=1), []).extend([int(number[0])] if number else [])
    return ", ".join(
        pattern.replace("{}", _ranges(numbers)) if numbers else pattern for pattern, numbers in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = (str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return "{" + ",".join(texts) + "}"


@dataclass
class MovedTensors:
    """The tensors of the new checkpoint, under its names, and how they came about.

    Attributes:
        tensors: name -> array as stored; joined ones are put together when they are written.
        bfloat16: names of those whose uint16 values are bfloat16.
        num_split: fused matrices and biases that were cut into three.
        num_joined: those that were put together from three.
        num_renamed: others whose name changed.
    """

    tensors: dict[str, NDArray[Any] | LazyArray] = field(default_factory=dict)
    bfloat16: set[str] = field(default_factory=set)
    num_split: int = 0
    num_joined: int = 0
    num_renamed: int = 0


def move(source: SourceTensors, kind: CheckpointKind, architecture: DecoderArchitecture) -> MovedTensors:
    """The same values in another format."""
    moved = MovedTensors()
    for name in plain_shapes(architecture, kind):
        array, origin = _made(name, source)
        own_name = spelled(name, kind)
        if source.is_bare:
            own_name = own_name.removeprefix("model.")
        moved.tensors[own_name] = array
        if source.dtype(origin) == "BF16":
            moved.bfloat16.add(own_name)
        is_fused, was_fused = _FUSED in name, _FUSED in origin
        moved.num_joined += is_fused and not was_fused
        moved.num_split += was_fused and not is_fused and ".q_proj." in name
        moved.num_renamed += is_fused == was_fused and own_name != source.tensors[origin][1]
    return moved


def _made(name: str, source: SourceTensors) -> tuple[NDArray[Any] | LazyArray, str]:
    """The array of a plain name, and the source tensor it comes from (one of them, if it is joined)."""
    if name in source.tensors:
        return source.raw(name), name
    if part := _PART.search(name):
        origin = _PART.sub(_FUSED, name)
        return thirds(source.raw(origin))["qkv".index(part[1])], origin
    origins = [name.replace(_FUSED, f".attn.{part}_proj.") for part in "qkv"]
    parts = [source.raw(origin) for origin in origins]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(shape, parts[0].dtype, lambda: np.concatenate(parts)), origins[0]


def thirds(fused: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The rows of q, of k and of v: views of a fused matrix (3 C, C) or bias (3 C).

    >>> [part.ravel().tolist() for part in thirds(np.arange(6).reshape(6, 1))]
    [[0, 1], [2, 3], [4, 5]]
    """
    assert fused.shape[0] % 3 == 0, fused.shape
    rows = fused.shape[0] // 3
    return fused[:rows], fused[rows : 2 * rows], fused[2 * rows :]
