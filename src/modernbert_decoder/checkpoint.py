"""Checkpoints: find one by name, folder or Hub id, open it memory-mapped, check every tensor.

This module knows which files make a checkpoint and which tensors belong in it (it asks `architecture`); how
the tensors are computed with is the engine's business, and how packed weights are coded is `quantization`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.atomic_files import write_folder
from modernbert_decoder.config_keys import QUANTIZATION_KEY, ConfigReader, load_config
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError, ModelNotFoundError
from modernbert_decoder.hub import PICKLE_SUFFIXES, DownloadError, download_checkpoint, pickles_refused
from modernbert_decoder.safetensors_files import FLOAT_DTYPES, SafetensorsFile, write_safetensors
from modernbert_decoder.spellings import read_eos_token_ids

if TYPE_CHECKING:
    from modernbert_decoder.quantization import QuantizationScheme

__all__ = [
    "BUNDLED_MODEL",
    "QUANTIZATION_KEY",
    "Checkpoint",
    "cache_folder",
    "canonical_names",
    "drop_tied_copy",
    "find_checkpoint",
    "open_weights",
    "write_folder",
    "write_safetensors",
]

BUNDLED_MODEL = "storyteller"

_FINGERPRINT_VERSION = 1  # raise it when the meaning of a fingerprint's parts changes
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BODY = ("embeddings.", "layers.", "final_norm.")  # what stands behind `model.` in a model with a head
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MAX_LISTED = 12  # entries of one kind in an error message


def find_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    show_progress: bool = True,
) -> Path:
    """The folder of a model given by bundled name, folder or Hub id, tried in this order.

    The bundled name wins over a folder of the same name, which is reached as `./storyteller`.

    Args:
        model: `"storyteller"`, a folder, or a Hub id such as `"jhu-clsp/ettin-decoder-17m"`.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept, instead of the Hub's usual cache.
        show_progress: draw progress bars while downloading, if standard error is a terminal.

    Raises:
        ModelNotFoundError: nothing was found; lists what was tried and what to do.
        InputError: a revision was given for something that is not on the Hub.
        CheckpointError: a Hub repository without safetensors weights.
    """
    folder = _find_locally(model)
    if folder is not None:
        if revision is not None:
            raise InputError(
                f"revision {revision!r} applies to models on the Hub, but {model} is a local folder"
            )
        return folder
    tried = [
        f"bundled models: {BUNDLED_MODEL}",
        f"a folder: {Path(os.path.expanduser(model)).absolute()} does not exist",
    ]
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        try:
            return download_checkpoint(
                model, revision=revision, cache_dir=cache_dir, show_progress=show_progress
            )
        except DownloadError as error:
            tried.append(f"the Hub, {model} at revision {revision or 'main'}: {error}")
            raise _not_found(model, tried) from error
    tried.append("the Hub: not tried, since this cannot be a Hub id (organisation/name)")
    raise _not_found(model, tried)


def _find_locally(model: str | Path) -> Path | None:
    """The bundled model or an existing folder; a file is refused with a hint at its folder."""
    if model == BUNDLED_MODEL and isinstance(model, str):
        return Path(__file__).parent / "assets" / BUNDLED_MODEL
    path = os.path.expanduser(model)
    if os.path.isfile(path):
        folder = Path(path).absolute().parent
        raise ModelNotFoundError(f"{path} is a file; give the folder that holds it: {folder}")
    return Path(path) if os.path.isdir(path) else None  # unlike pathlib, false for names no system could have


def _not_found(model: str | Path, tried: Iterable[str]) -> ModelNotFoundError:
    lines = "".join(f"\n  - {attempt}" for attempt in tried)
    return ModelNotFoundError(f"no model found under {str(model)!r}. Tried:{lines}")


def cache_folder() -> Path:
    """Where packed weights are kept between runs; not created here.

    `MBD_CACHE`, else `modernbert-decoder` in the user's cache folder.
    """
    own = os.environ.get("MBD_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general) if general else Path.home() / ".cache") / "modernbert-decoder"


class Checkpoint:
    """An opened folder whose tensors are known to fit its configuration.

    Attributes:
        folder: the folder.
        architecture: what its `config.json` says.
        generation_config: the content of `generation_config.json`, empty if there is none.
        eos_token_ids: the ids that end a text, as `config.json` and `generation_config.json` state them.
        scheme: how the matrices are packed, for a folder of packed weights; else None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        architecture: DecoderArchitecture,
        generation_config: dict[str, Any],
        eos_token_ids: tuple[int, ...],
        scheme: QuantizationScheme | None,
        tensors: Mapping[str, tuple[SafetensorsFile, str]],
        identity: str,
    ) -> None:
        """For `open`, which has checked all of this; `tensors`: name -> file and the name it has there."""
        self.folder = folder
        self.architecture = architecture
        self.generation_config = generation_config
        self.eos_token_ids = eos_token_ids
        self.scheme = scheme
        self._tensors = tensors
        self._identity = identity

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the configuration and the headers of the weights, and compare them.

        Raises:
            ModelNotFoundError: no such folder, or no `config.json` in it.
            ConfigurationError: a configuration that cannot be honoured, `generation_config.json` included.
            CheckpointError: weights missing, damaged or pickled, or tensors missing, unexpected or misshapen
                (all in one error).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder} is not a folder; give the folder that holds config.json")
        config_path = folder / "config.json"
        config = load_config(config_path)
        scheme = _read_scheme(config.get(QUANTIZATION_KEY), config_path)
        architecture = DecoderArchitecture.from_config(config, source=str(config_path))
        files = open_weights(folder)
        stored = canonical_names(files)
        drop_tied_copy(stored, architecture)
        expected = architecture.tensor_shapes() if scheme is None else scheme.packed_shapes(architecture)
        _check_tensors(folder, stored, expected, architecture, is_packed=scheme is not None)
        generation_config, eos_token_ids = _read_generation_config(folder, architecture)
        return cls(
            folder,
            architecture=architecture,
            generation_config=generation_config,
            eos_token_ids=eos_token_ids,
            scheme=scheme,
            tensors={name: stored[name] for name in expected},
            identity=_identity(folder, config_path, files),
        )

    def names(self) -> tuple[str, ...]:
        """Every tensor, by the name that the architecture (or the packing) gives it."""
        return tuple(self._tensors)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def place(self, name: str) -> tuple[SafetensorsFile, str]:
        """The file that holds a tensor, and the name it has there."""
        return self._tensors[name]

    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""
        return load_config(self.folder / "config.json")

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored (bfloat16 as uint16), a read-only view of the mapped file."""
        file, stored_name = self._tensors[name]
        return file.raw(stored_name)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The tensor as float32: a read-only view of the mapped file when it is stored so, else converted.

        Raises:
            CheckpointError: it holds NaN or infinity, or is a packed matrix.
        """
        file, stored_name = self._tensors[name]
        return file.as_float32(stored_name)

    def stored_dtype(self, name: str) -> str:
        """The type a tensor is stored as, as the format spells it: "F32", "F16", "BF16", "F64" or "U8"."""
        file, stored_name = self._tensors[name]
        return file.tensors[stored_name].dtype

    def fingerprint(self) -> str:
        """A cheap identity for caching what is derived from the weights, which are not read.

        The hex SHA-256 of the path and of every file's name, size and time of change when it was opened.
        """
        return hashlib.sha256(self._identity.encode()).hexdigest()


def _read_scheme(entry: Any, config_path: Path) -> QuantizationScheme | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{config_path}: {QUANTIZATION_KEY} is {entry!r} instead of a JSON object")
    from modernbert_decoder.quantization import QuantizationScheme

    try:
        return QuantizationScheme.from_dict(entry)
    except ConfigurationError as error:
        raise ConfigurationError(f"{config_path}: {error}") from None


def _read_generation_config(
    folder: Path, architecture: DecoderArchitecture
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The file's content, and the ids that end a text: those of the file besides those of `config.json`."""
    path = folder / "generation_config.json"
    try:
        content = load_config(path)
    except ModelNotFoundError:  # a file that need not be there
        return {}, architecture.eos_token_ids
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} The model can also be used without this file.") from None
    try:
        stated = read_eos_token_ids(ConfigReader(content), default=None)
        for token_id in stated:
            if not 0 <= token_id < architecture.vocab_size:
                raise ConfigurationError(
                    f"eos_token_id is {token_id}, outside the vocabulary of {architecture.vocab_size}."
                )
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error} Correct or remove the key.") from None
    return dict(content), tuple(dict.fromkeys((*architecture.eos_token_ids, *stated)))


def open_weights(folder: Path) -> list[SafetensorsFile]:
    """The single weights file, or all shards of the index."""
    if (folder / _WEIGHTS).is_file():
        return [SafetensorsFile(folder / _WEIGHTS)]
    if (folder / _INDEX).is_file():
        return _open_shards(folder)
    names = [path.name for path in folder.iterdir()]
    for name in (_WEIGHTS, _INDEX):
        if name in names:
            raise CheckpointError(
                f"{folder / name} is not a file, or a link to one; download or copy the weights again"
            )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if pickles and not others:
        raise pickles_refused(str(folder), pickles, str(folder))
    found = f" (it holds {_listed(others)})" if others else ""
    raise CheckpointError(
        f"{folder} holds neither {_WEIGHTS} nor {_INDEX}{found}; download or copy the weights again"
    )


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    """All shards that the index names, sound, with each indexed tensor in its shard and in no other."""
    index_path = folder / _INDEX
    weight_map = load_config(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path} has no proper weight_map; download or copy it again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(
            f"{index_path} names files outside its folder, which are not opened: {_listed(outside)}"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} weights files that {_INDEX} names: "
            f"{_listed(missing)}. Download or copy them again"
        )
    files = {shard: SafetensorsFile(folder / shard) for shard in shards}
    absent = [
        f"{name} (in {shard})" for name, shard in weight_map.items() if name not in files[shard].tensors
    ]
    if absent:
        raise CheckpointError(
            f"{index_path} names {len(absent)} tensors that are not where it says: {_listed(absent)}. "
            "The index and the weights files are of different checkpoints; download them again"
        )
    return list(files.values())


def canonical_names(files: Iterable[SafetensorsFile]) -> dict[str, tuple[SafetensorsFile, str]]:
    """Name -> (file, name in the file); names of a bare model, without `model.`, get that prefix."""
    files = list(files)
    names = [name for file in files for name in file.tensors]
    is_bare = not any(name.startswith("model.") for name in names)
    canonical: dict[str, tuple[SafetensorsFile, str]] = {}
    for file in files:
        for name in file.tensors:
            key = f"model.{name}" if is_bare and name.startswith(_BODY) else name
            if key in canonical:
                raise CheckpointError(
                    f"tensor {name} is in both {canonical[key][0].path.name} and {file.path.name} of "
                    f"{file.path.parent}"
                )
            canonical[key] = (file, name)
    return canonical


def drop_tied_copy(stored: dict[str, tuple[SafetensorsFile, str]], architecture: DecoderArchitecture) -> None:
    """Forget a `decoder.weight` that repeats the embedding of a tied model; one that differs is an error."""
    is_expected = VOCABULARY in architecture.tensor_shapes()
    if is_expected or not architecture.tie_word_embeddings or not {VOCABULARY, EMBEDDING} <= stored.keys():
        return
    (copy_file, copy_name), (file, name) = stored[VOCABULARY], stored[EMBEDDING]
    if copy_file.tensors[copy_name].shape != file.tensors[name].shape:
        return  # reported with the other unexpected tensors
    if copy_file.tensors[copy_name].dtype == file.tensors[name].dtype:
        is_equal = np.array_equal(copy_file.raw(copy_name).view(np.uint8), file.raw(name).view(np.uint8))
    else:
        is_equal = np.array_equal(copy_file.as_float32(copy_name), file.as_float32(name))
    if not is_equal:
        raise CheckpointError(
            f"{copy_file.path}: {VOCABULARY} differs from {EMBEDDING}, although config.json ties them "
            '(tie_word_embeddings is true); set "tie_word_embeddings": false if the model was trained untied'
        )
    del stored[VOCABULARY]


def _check_tensors(
    folder: Path,
    stored: Mapping[str, tuple[SafetensorsFile, str]],
    expected: Mapping[str, tuple[int, ...]],
    architecture: DecoderArchitecture,
    *,
    is_packed: bool,
) -> None:
    """Raise one error with every missing, unexpected, misshapen and wrongly typed tensor, if there is any."""
    found = {name: file.tensors[stored_name] for name, (file, stored_name) in stored.items()}
    shared = [name for name in expected if name in found]
    allowed = {name: _allowed_dtypes(name, is_packed=is_packed) for name in shared}
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {tensor.shape}" for name, tensor in found.items() if name not in expected],
        "misshapen": [
            f"{name}: expected {expected[name]}, found {found[name].shape}"
            for name in shared
            if found[name].shape != tuple(expected[name])
        ],
        "of a type that cannot be used": [
            f"{name}: {found[name].dtype}" + (f" instead of {' '.join(allowed[name])}" if is_packed else "")
            for name in shared
            if found[name].dtype not in allowed[name]
        ],
    }
    lines = [f"  {len(entries)} {kind}: {_listed(entries)}" for kind, entries in problems.items() if entries]
    if not lines:
        return
    raise CheckpointError(
        f"the weights in {folder} do not fit its config.json ({architecture.num_hidden_layers} layers, "
        f"hidden size {architecture.hidden_size}, vocabulary {architecture.vocab_size}, "
        f"head {architecture.head.value}):\n"
        + "\n".join(lines)
        + "\nCheck that both belong to the same model, or download it again"
    )


def _allowed_dtypes(name: str, *, is_packed: bool) -> frozenset[str]:
    """What a tensor may be stored as; those of a packed folder are computed with as they are."""
    if is_packed and name.endswith(".data"):
        return frozenset({"U8"})
    return frozenset({"F32"}) if is_packed else FLOAT_DTYPES


def _identity(folder: Path, config_path: Path, files: Iterable[SafetensorsFile]) -> str:
    status = config_path.stat()
    parts = [(config_path.name, status.st_size, status.st_mtime_ns)]
    parts += [(file.path.name, file.size_bytes, file.modified_ns) for file in files]
    return json.dumps([_FINGERPRINT_VERSION, str(folder.resolve()), sorted(parts)])


def _listed(entries: list[str]) -> str:
    """The first entries and how many more there are."""
    more = f", ... and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    return ", ".join(entries[:_MAX_LISTED]) + more
