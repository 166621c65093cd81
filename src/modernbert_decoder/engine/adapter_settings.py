"""The settings of a PEFT adapter: what of `adapter_config.json` means something here, and what is refused.

Responsible for patterns, scaling, and for naming every setting whose effect merging could not reproduce.
Must not know about tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.config_keys import load_config
from modernbert_decoder.errors import ConfigurationError, ModelNotFoundError

# How training began or ran, where the adapter came from, and what PEFT ignores for linear layers.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",  # tied layers are refused if adapted, whatever this says
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # PEFT turns it off for linear layers, and all of ours are
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "bias",  # trained biases are in the file
    }
)
_READ: Final = frozenset(
    {
        "alpha_pattern",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
# Ways to start that leave the base model as it was; the others (PiSSA, OLoRA, ...) change its weights.
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA adapter's settings, all of which are honoured.

    Attributes:
        rank: of modules without a rank of their own.
        alpha: the numerator of the scaling, likewise.
        rank_pattern, alpha_pattern: regular expression for the end of a module's name -> its own.
        use_rslora: the scaling is alpha / sqrt(rank), not alpha / rank.
        use_dora: rows of the merged matrices have lengths of their own.
        listed_targets: module names, or ends of them; empty where a regular expression chose.
        adapts_all_layers: whether every module so named is adapted.
        identity: tells these settings from others.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    listed_targets: tuple[str, ...]
    adapts_all_layers: bool
    identity: str

    @classmethod
    def read(cls, path: Path) -> AdapterSettings:
        """Reads and checks `adapter_config.json`.

        Raises:
            ModelNotFoundError: it is not there.
            ConfigurationError: it is no LoRA, or has a setting that merging cannot honour.
        """
        if not path.is_file():
            raise ModelNotFoundError(
                f"{path.parent} holds no {path.name}; give the folder that PEFT or `mbd train finetune` wrote"
            )
        config = load_config(path)
        try:
            _refuse(config)
            return cls._read(config)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> AdapterSettings:
        targets = config.get("target_modules")
        is_listed = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        if not (is_listed or isinstance(targets, str) or targets is None):
            raise ConfigurationError(f"target_modules is {targets!r}, but must be names or a pattern.")
        return cls(
            rank=_rank(config.get("r", 8), "r"),
            alpha=_number(config.get("lora_alpha", 8), "lora_alpha"),
            rank_pattern={
                key: _rank(value, f"rank_pattern.{key}")
                for key, value in _pattern(config, "rank_pattern").items()
            },
            alpha_pattern={
                key: _number(value, f"alpha_pattern.{key}")
                for key, value in _pattern(config, "alpha_pattern").items()
            },
            use_rslora=config.get("use_rslora") is True,
            use_dora=config.get("use_dora") is True,
            listed_targets=tuple(sorted(targets)) if is_listed and targets else (),
            adapts_all_layers=config.get("layers_to_transform") is None
            and not config.get("exclude_modules")
            and config.get("init_lora_weights") != "eva",
            identity=json.dumps(config, sort_keys=True),
        )

    def rank_of(self, module: str) -> int:
        """R of a module."""
        key = _matching(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str) -> float:
        """The factor of B @ A."""
        key = _matching(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises for every setting that would make the merged model another than PEFT's."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigurationError(f"peft_type is {kind!r}; only LORA adapters can be merged here.")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise ConfigurationError(
            f"init_lora_weights is {start!r}, which changes the base model's weights before training. Save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion: it is then an ordinary one."
        )
    unknown = sorted(
        f"{key} = {value!r}"
        for key, value in config.items()
        if key not in _WITHOUT_EFFECT | _READ and value not in (None, False, [], {}, "")
    )
    if unknown:
        raise ConfigurationError(
            f"{', '.join(unknown)} cannot be honoured. Merge the adapter with PEFT (merge_and_unload), save "
            "the model, and use that folder."
        )


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise ConfigurationError(f"{key} is {pattern!r}, but must be an object.")
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigurationError(f"{key} has {expression!r}, which is no pattern: {error}.") from None
    return pattern


def _matching(pattern: Mapping[str, Any], module: str) -> str | None:
    """The first expression that a module's name is, or ends with after a dot; PEFT's rule."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def _rank(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}, but must be a positive integer.")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"{name} is {value!r}, but must be a number.")
    return float(value)
