"""One checkpoint folder in, one in another format out: configuration, tensors and the files beside them.

Responsible for the order of things and for what is copied along. Formats are told apart in `kinds.py`, the
trainer's keys are read in `flexbert.py`, tensors move in `tensors.py`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.atomic_files import write_folder
from modernbert_decoder.checkpoint import open_weights
from modernbert_decoder.config_keys import QUANTIZATION_KEY, load_config
from modernbert_decoder.conversion.flexbert import flexbert_as_decoder_config
from modernbert_decoder.conversion.kinds import (
    CheckpointKind,
    carried_keys,
    config_for,
    encoder_as_decoder_config,
    kind_of,
    limitations,
    refuse_classifiers,
)
from modernbert_decoder.conversion.tensors import SourceTensors, fit, move, num_embeddings, read_names
from modernbert_decoder.errors import CheckpointError, InputError, ModelNotFoundError
from modernbert_decoder.hub import PICKLE_SUFFIXES
from modernbert_decoder.safetensors_files import write_safetensors

# Text stays what it was: these are copied as they are.
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source_kind, target_kind: the formats.
        architecture: sizes, window and bases of both.
        num_read, num_written: tensors of the old and the new checkpoint.
        num_split: fused matrices and biases that were cut into three.
        num_joined: those that were put together from three.
        num_renamed: others whose name changed.
        num_dropped: copies of a tied embedding that were left out.
        weight_bytes: of the tensors written.
        copied: names of the files copied along.
        limitations: what some version of transformers reads differently.
    """

    source_kind: CheckpointKind
    target_kind: CheckpointKind
    architecture: DecoderArchitecture
    num_read: int
    num_written: int
    num_split: int
    num_joined: int
    num_renamed: int
    num_dropped: int
    weight_bytes: int
    copied: tuple[str, ...]
    limitations: tuple[str, ...]


def convert_checkpoint(
    source: Path,
    destination: Path,
    *,
    to: CheckpointKind,
    overwrite: bool = False,
    max_positions: int | None = None,
) -> Conversion:
    """Writes the model in `source` as a decoder or an encoder in Hugging Face format.

    Every value keeps its bits and its type. The new folder appears whole or not at all.

    Args:
        source: a folder with `config.json` and safetensors weights, single or sharded.
        destination: the new folder.
        to: `DECODER` or `ENCODER`.
        overwrite: replace a model folder that is there.
        max_positions: for FlexBERT sources, the context to state in `config.json`.

    Raises:
        ModelNotFoundError: no such folder, or no `config.json` in it.
        ConfigurationError: a model that has no counterpart, or a file that cannot be honoured.
        CheckpointError: weights that are pickled, damaged, or do not fit the configuration.
        InputError: there is nothing to convert, or the destination may not be written.
    """
    assert to is not CheckpointKind.FLEXBERT, to
    source = Path(source)
    opened = _open(source, max_positions=max_positions)
    _refuse_the_pointless(source, destination, opened, to=to, max_positions=max_positions)
    moved = move(opened.tensors, to, opened.architecture)
    carried = {} if opened.kind is CheckpointKind.FLEXBERT else carried_keys(opened.config)
    new_config = config_for(to, opened.architecture, carried)
    companions = tuple(name for name in _COMPANIONS if (source / name).is_file())

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(new_config, indent=2) + "\n", encoding="utf-8")
        for name in companions:
            shutil.copyfile(source / name, folder / name)
        path = folder / "model.safetensors"
        write_safetensors(path, moved.tensors, {"format": "pt"}, bfloat16=moved.bfloat16)

    write_folder(destination, write, overwrite=overwrite)
    lacking = limitations(to, opened.architecture)
    for limitation in lacking:
        warnings.warn(limitation, UserWarning, stacklevel=2)
    return Conversion(
        source_kind=opened.kind,
        target_kind=to,
        architecture=opened.architecture,
        num_read=opened.num_tensors,
        num_written=len(moved.tensors),
        num_split=moved.num_split,
        num_joined=moved.num_joined,
        num_renamed=moved.num_renamed,
        num_dropped=opened.tensors.num_dropped,
        weight_bytes=sum(array.nbytes for array in moved.tensors.values()),
        copied=companions,
        limitations=lacking,
    )


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that was found sound: its format, its parsed `config.json`, and what they mean."""

    kind: CheckpointKind
    config: Mapping[str, Any]
    architecture: DecoderArchitecture
    tensors: SourceTensors
    num_tensors: int


def _open(source: Path, *, max_positions: int | None) -> _Opened:
    _refuse_pickles(source)
    where = str(source / "config.json")
    config = load_config(source / "config.json")
    kind = kind_of(config, source=where)
    refuse_classifiers(config, source=where)
    if config.get(QUANTIZATION_KEY) is not None:
        raise InputError(f"{source} holds quantized weights; convert the original checkpoint")
    stored = read_names(open_weights(source), kind)
    in_decoder_terms = config
    if kind is CheckpointKind.ENCODER:
        in_decoder_terms = encoder_as_decoder_config(config, source=where)
    elif kind is CheckpointKind.FLEXBERT:
        in_decoder_terms = flexbert_as_decoder_config(
            config, folder=source, num_embeddings=num_embeddings(stored, kind), max_positions=max_positions
        )
    architecture = DecoderArchitecture.from_config(in_decoder_terms, source=where)
    tensors = fit(stored, kind, architecture, folder=source)
    return _Opened(kind, config, architecture, tensors, len(stored))


def _refuse_the_pointless(
    source: Path,
    destination: Path,
    opened: _Opened,
    *,
    to: CheckpointKind,
    max_positions: int | None,
) -> None:
    """Raises `InputError` for what needs no conversion or would destroy its source."""
    if opened.kind is to:
        raise InputError(f"{source} is in {to} format already; there is nothing to convert")
    if max_positions is not None and opened.kind is not CheckpointKind.FLEXBERT:
        raise InputError(
            f"{source} states its own max_position_embeddings; leave --max-positions out, which is for "
            "checkpoints of the trainer"
        )
    if destination.expanduser().resolve() == source.resolve():
        raise InputError(f"{destination} is the checkpoint itself; give the name of another folder")


def _refuse_pickles(source: Path) -> None:
    """Raises `CheckpointError`, with the way out, for a folder whose only weights are pickles."""
    if not source.is_dir():
        raise ModelNotFoundError(f"{source} is not a folder; give the folder that holds config.json")
    names = sorted(path.name for path in source.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if not pickles or any(name.endswith(".safetensors") for name in names):
        return
    example = str(source / (pickles[0] if len(pickles) == 1 else "FILE"))
    raise CheckpointError(
        f"{source} holds no safetensors weights, only pickle files ({', '.join(pickles[:5])}). Loading a "
        "pickle can run any code, so they are not opened here. Where torch is installed, this reads tensors "
        "and nothing else, and writes them beside it:\n"
        "  import torch\n"
        "  from safetensors.torch import save_file\n"
        f"  saved = torch.load({example!r}, map_location='cpu', weights_only=True)\n"
        "  tensors = saved['state']['model'] if 'state' in saved else saved\n"
        "  tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}\n"
        f"  save_file(tensors, {str(source / 'model.safetensors')!r})"
    )
