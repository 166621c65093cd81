"""From a checkpoint to what a session needs: weights in the asked-for format, by initializer name.

Quantized weights are written once into the cache folder, as a packed checkpoint like any other, and mapped
from there at the next start; `quantize_checkpoint` writes the same folder where the user wants it.
This module knows checkpoints and formats; it knows nothing of graphs' nodes or of sessions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, Head, LayerKind
from modernbert_decoder.atomic_files import WritingError
from modernbert_decoder.checkpoint import (
    QUANTIZATION_KEY,
    Checkpoint,
    cache_folder,
    write_folder,
    write_safetensors,
)
from modernbert_decoder.costs import EMBEDDING
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError, ModelNotFoundError
from modernbert_decoder.quantization import (
    PackedMatrix,
    QuantizationScheme,
    fused_shapes,
    fused_tensor,
    quantize,
)

Weights = dict[str, NDArray[Any]]
# The embedding seen as a table of rows (V, bytes of a row): the bytes of `<embedding>.data`, another shape.
EMBEDDING_ROWS: Final = f"{EMBEDDING}.rows"
# Files beside the weights that a packed folder takes over unchanged.
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "README.md",
)
OnMatrix = Callable[[str, PackedMatrix, NDArray[np.float32]], None]


def resolve_scheme(
    checkpoint: Checkpoint, dtype: str | None, vocabulary_dtype: str | None, *, name: str = "dtype"
) -> QuantizationScheme:
    """The scheme to run a checkpoint in: the one asked for, or int8; a packed folder has its own.

    Of a packed folder `dtype` asks for the layers' format and `vocabulary_dtype` for that of the embedding
    and vocabulary matrix; what is not asked for is as the folder has it. `name` is what the user calls the
    former.

    Raises:
        InputError: an unknown name, or another format than a packed folder holds.
    """
    asked = QuantizationScheme.named(dtype or "int8", vocabulary_dtype, name=name)
    held = checkpoint.scheme
    if held is None:
        return asked
    refused = []
    if dtype is not None and not asked.body.is_like(held.body):
        refused.append(f"{name} {dtype}")
    if vocabulary_dtype is not None and not asked.vocabulary.is_like(held.vocabulary):
        refused.append(f"vocabulary_dtype {vocabulary_dtype}")
    if refused:
        raise InputError(
            f"{checkpoint.folder} holds {held.name} weights and {' with '.join(refused)} was asked for; "
            f"leave {'both' if len(refused) == 2 else 'it'} out, or load the original checkpoint"
        )
    return held


def load_weights(checkpoint: Checkpoint, scheme: QuantizationScheme, *, threads: int) -> Weights:
    """Initializer name -> array; quantized weights are mapped from the cache, and put there first if need be.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    if checkpoint.scheme is not None:
        return _initializers(checkpoint, {name: checkpoint.raw(name) for name in checkpoint.names()})
    if scheme.is_float32:
        return {name: fused_tensor(name, checkpoint.tensor) for name in fused_shapes(checkpoint.architecture)}
    packed = _cached(checkpoint, scheme, threads=threads)
    if packed is not None:
        return load_weights(packed, scheme, threads=threads)
    return _initializers(checkpoint, pack_tensors(checkpoint, scheme, threads=threads))


def quantize_checkpoint(
    checkpoint: Checkpoint,
    scheme: QuantizationScheme,
    destination: Path,
    *,
    threads: int,
    overwrite: bool = False,
    on_matrix: OnMatrix | None = None,
) -> None:
    """Writes a packed folder that loads like any other; nothing is left under its name on failure.

    Args:
        checkpoint: an unpacked one.
        scheme: the formats to write.
        destination: the new folder.
        threads: for rounding.
        overwrite: replace a folder that is there.
        on_matrix: called with the name, the packed matrix and the original after each matrix.

    Raises:
        InputError: the checkpoint is packed already, the scheme is float32, or the destination exists.
    """
    if checkpoint.scheme is not None:
        raise InputError(
            f"{checkpoint.folder} already holds {checkpoint.scheme.name} weights; "
            "quantize the original checkpoint"
        )
    if scheme.is_float32:
        raise InputError("float32 is not a quantized format; choose int8 or int4")

    def write(folder: Path) -> None:
        config = {**checkpoint.config(), QUANTIZATION_KEY: scheme.to_dict()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _COMPANIONS:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
        tensors = pack_tensors(checkpoint, scheme, threads=threads, on_matrix=on_matrix)
        write_safetensors(folder / "model.safetensors", tensors, {"format": "modernbert-decoder"})

    write_folder(destination, write, overwrite=overwrite)


def pack_tensors(
    checkpoint: Checkpoint, scheme: QuantizationScheme, *, threads: int, on_matrix: OnMatrix | None = None
) -> Weights:
    """The tensors of a packed folder, as `QuantizationScheme.packed_shapes` lists them."""
    tensors: Weights = {}
    for name, shape in fused_shapes(checkpoint.architecture).items():
        tensor = fused_tensor(name, checkpoint.tensor)
        matrix = scheme.format_of(name)
        if len(shape) == 1 or matrix.bits == 32:
            tensors[name] = tensor
            continue
        packed = quantize(tensor, matrix.fitted(shape[1]), name=name, threads=threads)
        tensors.update(packed.tensors(name))
        if on_matrix is not None:
            on_matrix(name, packed, tensor)
    return tensors


def rotary_tables(architecture: DecoderArchitecture, num_positions: int) -> dict[str, NDArray[np.float32]]:
    """Initializer name -> cosine or sine table (num_positions, D / 2), one pair for each distinct RoPE.

    Raises:
        InputError: they do not fit into memory.
    """
    tables: dict[str, NDArray[np.float32]] = {}
    for kind in dict.fromkeys(architecture.layer_kinds):
        name = rotary_name(architecture, kind)
        if f"{name}.cos" not in tables:
            try:
                cos, sin = architecture.rotary[kind].tables(num_positions, architecture.head_dim)
            except MemoryError as error:
                raise InputError(
                    f"the rotary tables of {num_positions:,} positions do not fit into memory ({error}); "
                    "lower max_context"
                ) from error
            tables[f"{name}.cos"], tables[f"{name}.sin"] = cos, sin
    return tables


def rotary_name(architecture: DecoderArchitecture, kind: LayerKind) -> str:
    """The name of a kind's tables: kinds with equal parameters share one pair."""
    for other in LayerKind:
        if architecture.rotary.get(other) == architecture.rotary[kind]:
            return f"rotary.{other.value}"
    raise AssertionError("a kind equals at least itself")


def _cached(checkpoint: Checkpoint, scheme: QuantizationScheme, *, threads: int) -> Checkpoint | None:
    """The packed form of a checkpoint in the cache folder; None, with a warning, where it cannot be kept."""
    key = checkpoint.fingerprint() + json.dumps(scheme.to_dict(), sort_keys=True)
    folder = cache_folder() / "packed" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if os.path.isdir(folder):  # unlike pathlib, false where the cache may not be searched
        try:
            return _open_quietly(folder)
        except (CheckpointError, ConfigurationError, ModelNotFoundError):
            shutil.rmtree(folder, ignore_errors=True)  # damaged from outside: written anew
    try:
        quantize_checkpoint(checkpoint, scheme, folder, threads=threads, overwrite=True)
    except (WritingError, InputError) as error:  # the latter: what stands in its place cannot be removed
        warnings.warn(
            f"quantized weights cannot be kept, so every start quantizes again: {error}. "
            "Set MBD_CACHE to a writable folder, or write them once with `mbd quantize`",
            stacklevel=2,
        )
        return None
    return _open_quietly(folder)


def _open_quietly(folder: Path) -> Checkpoint:
    """Opens our own copy of a checkpoint; its configuration was warned about with the original."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Checkpoint.open(folder)


def _initializers(checkpoint: Checkpoint, tensors: Mapping[str, NDArray[Any]]) -> Weights:
    """The tensors as the graph declares them.

    Bytes that stand for signed levels are seen as such; the embedding is added as a table of rows, and the
    view of it dropped that only a tied head computes with.
    """
    weights = {
        name: tensor.view(np.int8) if name.endswith(".data") and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    data = f"{EMBEDDING}.data"
    if data in weights:
        weights[EMBEDDING_ROWS] = weights[data].reshape(len(weights[data]), -1)
        architecture = checkpoint.architecture
        if architecture.head is not Head.CAUSAL_LM or not architecture.tie_word_embeddings:
            del weights[data]
    return weights
