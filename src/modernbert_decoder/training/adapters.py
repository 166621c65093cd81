"""LoRA in fine-tuning: which layers get an adapter, and what is saved with it.

The adapters are PEFT's. Knows nothing of data or of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import InputError

ADAPTER_FOLDER: Final = "adapter"
_LINEAR_LAYERS: Final = ("q_proj", "k_proj", "v_proj", "Wo", "Wi")
# The whole head of a classifier is trained: its labels are new.
_CLASSIFIER_MODULES: Final = ("head", "classifier")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA adapter on linear layers.

    Attributes:
        rank: of the added matrices.
        alpha: their product is multiplied by alpha / rank.
        dropout: on an adapter's input, in training.
        targets: names, or ends of names, of the layers; `Wo` is both attention's and the feed-forward's.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = _LINEAR_LAYERS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the rank of an adapter is {self.rank}, but must be 1 at least")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the dropout of an adapter is {self.dropout}, but must be from 0 to below 1")
        if not self.targets:
            raise InputError("no layers are named for the adapter")


def add_adapter(model: Any, settings: LoraSettings, *, is_classifier: bool) -> Any:
    """The model with a new adapter, whose base is frozen.

    Raises:
        InputError: PEFT is not installed, or the model has none of the layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError('LoRA needs the library peft: `pip install "modernbert-decoder[train]"`') from error
    names = {name for name, _ in model.named_modules()}
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                f"no layer is called {target!r}; those of the body are {', '.join(_LINEAR_LAYERS)}"
            )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        modules_to_save=list(_CLASSIFIER_MODULES) if is_classifier else None,
    )
    return get_peft_model(model, config)


def save_adapter(model: Any, folder: Path, *, base: Path) -> None:
    """Writes the adapter of a model in PEFT's format; `base` is what it goes on."""
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, which says nothing
