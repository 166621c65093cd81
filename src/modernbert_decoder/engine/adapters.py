"""LoRA adapters in PEFT's format, merged with a checkpoint's weights before anything is quantized.

Responsible for which settings of `adapter_config.json` can be honoured exactly (the others are refused by
name), for fitting the adapter's tensors to the checkpoint, and for the sums. Must not know PEFT or torch.

Shapes: N outputs and K inputs of a matrix, R rank, V vocabulary, C model width.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.atomic_files import write_folder
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.config_keys import load_config
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.engine.adapter_settings import AdapterSettings
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.errors import CheckpointError, InputError, ModelNotFoundError
from modernbert_decoder.safetensors_files import LazyArray, SafetensorsFile, write_safetensors
from modernbert_decoder.spellings import CLASS_NAMES

_WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_BODY: Final = ("embeddings.", "layers.", "final_norm.")  # of a bare model, whose names lack `model.`
_FACTOR: Final = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?$"
)
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_TIED: Final = (
    "but the model ties embedding and vocabulary projection (tie_word_embeddings): merged, it would change "
    "both. Train without it, or on an untied model"
)
_LABEL_KEYS: Final = ("id2label", "problem_type")


@dataclass(frozen=True)
class _LowRank:
    """What is added to one matrix (N, K): `scaling * B @ A`; with DoRA the sum's rows get given lengths.

    An embedding (V, C) has its factors the other way round: A is (R, V), B is (C, R).
    """

    a: str
    b: str
    scaling: float
    magnitude: str | None
    is_embedding: bool

    def added_to(self, weight: Float32, file: SafetensorsFile) -> Float32:
        """The merged matrix, in the order of operations in which PEFT merges."""
        delta = file.as_float32(self.b) @ file.as_float32(self.a)
        if self.is_embedding:
            delta = delta.T
        merged = weight + np.float32(self.scaling) * delta
        if self.magnitude is not None:
            lengths = np.linalg.norm(merged, axis=1, keepdims=True)
            merged *= file.as_float32(self.magnitude).reshape(-1, 1) / lengths
        return np.ascontiguousarray(merged, np.float32)


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are those of a base with an adapter merged in, computed when asked for.

    Attributes:
        base: the checkpoint underneath.
        adapter_folder: where the adapter is.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter_folder: Path,
        *,
        file: SafetensorsFile,
        config: Mapping[str, Any],
        architecture: DecoderArchitecture,
        low_rank: Mapping[str, _LowRank],
        replaced: Mapping[str, str],
        identity: str,
    ) -> None:
        """For `with_adapter`, which has checked all of this; `replaced`: name -> tensor of the adapter."""
        super().__init__(
            base.folder,
            architecture=architecture,
            generation_config=base.generation_config,
            eos_token_ids=base.eos_token_ids,
            scheme=None,
            tensors={
                name: (file, replaced[name]) if name in replaced else base.place(name)
                for name in architecture.tensor_shapes()
            },
            identity=identity,
        )
        self.base = base
        self.adapter_folder = adapter_folder
        self._file = file
        self._config = config
        self._low_rank = low_rank

    def config(self) -> Mapping[str, Any]:
        """The `config.json` of the merged model."""
        return self._config

    def tensor(self, name: str) -> Float32:
        """The merged tensor.

        Raises:
            CheckpointError: it, or what is added to it, holds NaN or infinity.
        """
        weight = super().tensor(name)
        change = self._low_rank.get(name)
        return weight if change is None else change.added_to(weight, self._file)

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored, or as float32 where the adapter changes it."""
        return self.tensor(name) if name in self._low_rank else super().raw(name)

    def stored_dtype(self, name: str) -> str:
        """The type that `raw` gives."""
        return "F32" if name in self._low_rank else super().stored_dtype(name)


def with_adapter(base: Checkpoint, folder: str | Path) -> AdaptedCheckpoint:
    """The checkpoint with a LoRA adapter merged in.

    An adapter that brings a classifier makes a language model one: it must also hold the classifier's head,
    and its labels are read from a `config.json` beside it, if there is one.

    Args:
        base: what the adapter was trained on.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelNotFoundError: no such folder, or no adapter in it.
        ConfigurationError: a setting that cannot be honoured.
        CheckpointError: damaged or pickled weights, or some that do not fit the base.
        InputError: the base is packed.
    """
    folder = Path(folder).expanduser()
    if base.scheme is not None:
        raise InputError(
            f"{base.folder} holds {base.scheme.name} weights, and an adapter is added before weights are "
            "rounded. Load the original checkpoint with the adapter (it is quantized as dtype says), or "
            "write a merged model with `mbd merge` and quantize that with `mbd quantize`"
        )
    settings = AdapterSettings.read(folder / "adapter_config.json")
    file = _open_weights(folder)
    config = _merged_config(base, folder, file)
    architecture = DecoderArchitecture.from_config(config, source=str(base.folder / "config.json"))
    fitted = _Fitting(base, architecture, settings, file).fit()
    identity = json.dumps(
        [base.fingerprint(), str(folder.resolve()), file.size_bytes, file.modified_ns, settings.identity]
    )
    return AdaptedCheckpoint(
        base,
        folder,
        file=file,
        config=config,
        architecture=architecture,
        low_rank=fitted.low_rank,
        replaced=fitted.replaced,
        identity=identity,
    )


def merge_adapter(base: Checkpoint, folder: Path, destination: Path, *, overwrite: bool = False) -> int:
    """Writes base and adapter as one model folder in float32; returns the bytes of its weights.

    Raises:
        UserError: as `with_adapter`, or the destination may not be written.
    """
    merged = with_adapter(base, folder)
    shapes = merged.architecture.tensor_shapes()
    tensors = {
        name: LazyArray(shape, np.dtype(np.float32), partial(merged.tensor, name))
        for name, shape in shapes.items()
    }

    def write(target: Path) -> None:
        config = {**merged.config(), "dtype": "float32"}
        config.pop("torch_dtype", None)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _COMPANIONS:
            if (base.folder / name).is_file():
                shutil.copyfile(base.folder / name, target / name)
        write_safetensors(target / "model.safetensors", tensors, {"format": "pt"})

    write_folder(destination, write, overwrite=overwrite)
    return sum(tensor.nbytes for tensor in tensors.values())


def _open_weights(folder: Path) -> SafetensorsFile:
    path = folder / _WEIGHTS
    if path.is_file():
        return SafetensorsFile(path)
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds its adapter as a pickle (adapter_model.bin), which can run any code and is not "
            "opened. Load it with PEFT and save it again, which writes adapter_model.safetensors"
        )
    raise ModelNotFoundError(f"{folder} holds no {_WEIGHTS}; copy or download the adapter again")


def _merged_config(base: Checkpoint, folder: Path, file: SafetensorsFile) -> dict[str, Any]:
    """The base's `config.json`, with class and labels of an adapter that brings a classifier."""
    config = dict(base.config())
    classifier = next(
        (tensor for name, tensor in file.tensors.items() if _plain(name) == "classifier.weight"), None
    )
    if classifier is None:
        return config
    num_labels = classifier.shape[0] if classifier.shape else 0
    stated: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():
        stated = load_config(folder / "config.json")
    elif base.architecture.head is Head.SEQUENCE_CLASSIFICATION:
        stated = dict(config)
    for key in (*_LABEL_KEYS, "label2id", "num_labels"):
        config.pop(key, None)
    config |= {key: stated[key] for key in _LABEL_KEYS if stated.get(key) is not None}
    if "id2label" not in config:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    if not isinstance(config["id2label"], dict) or len(config["id2label"]) != num_labels:
        raise CheckpointError(
            f"{file.path} has a classifier of {num_labels} outputs, and id2label is {config['id2label']!r}; "
            f"correct config.json in {folder}"
        )
    if all(str(key).isdigit() for key in config["id2label"]):
        config["label2id"] = {label: int(key) for key, label in config["id2label"].items()}
    config["architectures"] = [CLASS_NAMES[Head.SEQUENCE_CLASSIFICATION]]
    return config


def _plain(name: str) -> str:
    """An adapter's tensor under the name that the checkpoint gives the parameter.

    >>> _plain("base_model.model.model.layers.1.attn.Wo.base_layer.bias")
    'model.layers.1.attn.Wo.bias'
    """
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    return f"model.{name}" if name.startswith(_BODY) else name


class _Fitting:
    """Finds out which tensor of the adapter changes which of the checkpoint, and whether all of it fits.

    Attributes:
        low_rank: name of a checkpoint's tensor -> what is added to it.
        replaced: name -> the adapter's tensor that stands in its place.
    """

    def __init__(
        self,
        base: Checkpoint,
        architecture: DecoderArchitecture,
        settings: AdapterSettings,
        file: SafetensorsFile,
    ) -> None:
        self.low_rank: dict[str, _LowRank] = {}
        self.replaced: dict[str, str] = {}
        self._base = base
        self._settings = settings
        self._file = file
        self._shapes = architecture.tensor_shapes()
        self._is_tied = architecture.tie_word_embeddings and architecture.head is Head.CAUSAL_LM
        self._factors: dict[str, dict[str, str]] = {}
        self._problems: list[str] = []

    def fit(self) -> _Fitting:
        """Itself, filled.

        Raises:
            CheckpointError: whatever does not fit, in one error.
        """
        for name in self._file.tensors:
            match = _FACTOR.match(name)
            if match:
                module = _plain(match["module"] + ".").removesuffix(".")
                self._factors.setdefault(module, {})[match["part"]] = name
            else:
                self._replace(name)
        for module, factors in self._factors.items():
            self._add(module, factors)
        self._check_targets()
        lacking = [name for name in self._shapes if name not in self.replaced and not self._base.has(name)]
        if lacking:
            self._problems.append(self._lacks(lacking))
        if self._problems:
            listed = "\n".join(f"  {problem}" for problem in self._problems)
            raise CheckpointError(
                f"the adapter {self._file.path} cannot be merged with {self._base.folder}:\n{listed}"
            )
        return self

    def _lacks(self, names: list[str]) -> str:
        if all(name.startswith("head.") for name in names):
            return (
                f"it has a classifier, but neither it nor the language model has {', '.join(names)}, so that "
                "the head it was trained with is lost. Train with modules_to_save=['head', 'classifier']"
            )
        return f"neither of the two has {', '.join(names[:8])}"

    def _replace(self, stored_name: str) -> None:
        """A parameter saved whole: of `modules_to_save`, or a trained bias."""
        name, shape = _plain(stored_name), self._file.tensors[stored_name].shape
        if name in (EMBEDDING, VOCABULARY) and self._is_tied:
            if shape != self._shapes[EMBEDDING] or not np.array_equal(
                self._file.as_float32(stored_name), self._base.tensor(EMBEDDING)
            ):
                self._problems.append(f"it has a {name} of its own, {_TIED}")
        elif name not in self._shapes:
            self._problems.append(f"{stored_name} belongs to no parameter of this model")
        elif shape != self._shapes[name]:
            self._problems.append(f"{stored_name} has the shape {shape}, but {name} {self._shapes[name]}")
        else:
            self.replaced[name] = stored_name

    def _add(self, module: str, factors: Mapping[str, str]) -> None:
        """The two factors (and DoRA's lengths) of one module."""
        name, is_embedding = f"{module}.weight", "embedding_A" in factors or "embedding_B" in factors
        a, b = (factors.get(f"embedding_{part}" if is_embedding else part) for part in "AB")
        if a is None or b is None:
            self._problems.append(f"{module} has only {', '.join(factors.values())}; one factor is missing")
            return
        if name in (EMBEDDING, VOCABULARY) and self._is_tied:
            self._problems.append(f"it adapts {module}, {_TIED}")
            return
        if name not in self._shapes or name in self.replaced or not self._base.has(name):
            self._problems.append(f"{a} adapts {module}, which this model does not have")
            return
        shape = self._shapes[name]
        is_table = name == EMBEDDING
        rank = self._rank(self._file.tensors[a].shape, self._file.tensors[b].shape, shape, is_table)
        expected = self._settings.rank_of(module)
        if rank is None or len(shape) != 2 or is_table is not is_embedding:
            shapes = ", ".join(f"{self._file.tensors[each].shape}" for each in (a, b))
            self._problems.append(
                f"the factors of {module} have the shapes {shapes}, which do not give {shape}"
            )
        elif rank != expected:
            self._problems.append(
                f"{module} has rank {rank}, but adapter_config.json says {expected} (r, rank_pattern)"
            )
        elif self._settings.use_dora and (is_embedding or "magnitude_vector" not in factors):
            self._problems.append(
                f"{module} is to be merged as DoRA, which needs a linear layer and its magnitudes"
            )
        else:
            magnitude = factors.get("magnitude_vector") if self._settings.use_dora else None
            self.low_rank[name] = _LowRank(a, b, self._settings.scaling_of(module), magnitude, is_embedding)

    @staticmethod
    def _rank(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...], is_table: bool) -> int | None:
        """R, if the factors (R, K) and (N, R) give a matrix of this shape; of a table, its transpose."""
        expected = shape[::-1] if is_table else shape
        fits = len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == expected
        return a[0] if fits else None

    def _check_targets(self) -> None:
        """Every module that the configuration names must have its factors, or they got lost."""
        modules = [name.removesuffix(".weight") for name, shape in self._shapes.items() if len(shape) == 2]
        adapted = set(self._factors)
        for target in self._settings.listed_targets:
            named = [module for module in modules if module == target or module.endswith(f".{target}")]
            if not named:
                self._problems.append(f"target_modules names {target!r}, which this model does not have")
                continue
            lost = [module for module in named if module not in adapted]
            if lost and (self._settings.adapts_all_layers or len(lost) == len(named)):
                self._problems.append(
                    f"target_modules names {target!r}, but there is nothing for {', '.join(lost[:3])}"
                    f"{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}"
                )
