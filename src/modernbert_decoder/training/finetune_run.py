"""A fine-tuning run in a folder: begun, continued after a kill, and left as a model that others load.

Responsible for the library's arguments, for whose the folder is, and for the files of the result. What is
learned is laid out in `finetune.py`; knows no labels.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modernbert_decoder.atomic_files import make_readable, new_file, remove_unfinished, sync_folder
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.training.adapters import ADAPTER_FOLDER, LoraSettings, save_adapter
from modernbert_decoder.training.curve import curve_table, draw_curve
from modernbert_decoder.training.disk_errors import disk_errors_explained
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.finetune_checkpoints import (
    CHECKPOINTS,
    check_processes,
    finished_epochs,
    last_whole,
    step_of,
    whole_checkpoints,
)
from modernbert_decoder.training.finetune_trainer import FinetuneTrainer, Learning
from modernbert_decoder.training.precision import has_accelerator, uses_bfloat16
from modernbert_decoder.training.reporting import check_reporting, tensorboard_callback

_OPTIONS: Final = "finetune.json"
_STAGED: Final = ".staged"
_TENSORBOARD: Final = "tensorboard"
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a model is fine-tuned. The betas are those of the released models' own fine-tuning.

    Attributes:
        epochs: passes over the data, at most.
        batch_size: rows of a step, on each device.
        accumulation: batches whose gradients are added up for one step.
        learning_rate: the peak; None: 5e-5, with an adapter 5e-4.
        weight_decay: of AdamW, none on norms and biases.
        warmup: share of the steps in which the rate rises; afterwards it falls to 0 in a line.
        max_length: most tokens of a text.
        seed: of new weights, the order of rows, the split and dropout.
        precision: "auto" is bfloat16 where an accelerator has it.
        metric: what decides which epoch's model is kept; None: the problem's first.
        patience: stop after so many epochs without a better metric; None: never.
        gradient_checkpointing: compute layers twice to hold fewer activations.
        report_to: "tensorboard", "trackio" or others that transformers knows.
    """

    epochs: int = 3
    batch_size: int = 48
    accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_length: int = 256
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    metric: str | None = None
    patience: int | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, but must be 1 at least")
        if self.learning_rate is not None and not (0 < self.learning_rate < math.inf):
            raise InputError(f"the learning rate is {self.learning_rate}, but must be positive")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"the warm-up is {self.warmup}, but must be a share of the steps, from 0 to 1")
        if self.max_length < 4:
            raise InputError(f"the longest text has {self.max_length} tokens; allow 4 at least")

    def rate(self, lora: LoraSettings | None) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-5 if lora is None else 5e-4


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: with the model.
        report: what is in its `report.json`.
        is_new: False where the folder held this run's result already.
    """

    folder: Path
    report: Mapping[str, Any]
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """A run, as `finetune.py` lays it out.

    Attributes:
        base: the folder that training starts from.
        identity: options and data, which a run that is continued must share.
        settings: of the run.
        lora: of the adapter, if there is one.
        is_classifier: or else a language model.
        metric: that decides, if there is validation data.
        is_greater_better: whether a larger value of it is the better one.
        build: makes the model in float32, with its adapter.
        learning: what to learn.
        report: judges the trained model: what goes into `report.json`.
        card: the model card, from the report; `has_curve` says whether curve.png stands beside it.
        extras: further files, from the report: name -> text.
    """

    base: Path
    identity: Mapping[str, Any]
    settings: FinetuneSettings
    lora: LoraSettings | None
    is_classifier: bool
    metric: str
    is_greater_better: bool
    build: Callable[[], Any]
    learning: Learning
    report: Callable[[FinetuneTrainer], Mapping[str, Any]]
    card: Callable[..., str]
    extras: Callable[[Mapping[str, Any]], Mapping[str, str]]


def run(plan: FinetunePlan, out: Path, *, callbacks: Sequence[TrainerCallback] = ()) -> Outcome:
    """Trains, or goes on where a run of the same options stopped, and leaves the model in `out`.

    Several processes, replicas or shards, each compute their part of a step; all of them come here.

    Args:
        plan: what to do.
        out: a new or empty folder, or one in which this run was begun.
        callbacks: the library's, for progress.

    Raises:
        InputError: the folder holds something else, or a destination of numbers is not installed.
        TrainingError: the loss is no number, the disk is full, or the run was begun by other processes.
    """
    out = Path(os.path.abspath(out.expanduser()))
    check_reporting(plan.settings.report_to, where="--report-to", otherwise="leave it out")
    arguments = _arguments(plan, out / CHECKPOINTS)  # before all else: with it, processes find each other
    identity = json.loads(json.dumps({**plan.identity, "settings": asdict(plan.settings)}))
    if (finished := _finished(out, identity)) is not None:
        if PartialState().is_main_process:
            _remove_leftovers(out)
        return Outcome(out, finished, is_new=False)
    with PartialState().main_process_first():
        _claim(out, identity)
        checkpoint = last_whole(out)
    set_seed(plan.settings.seed)
    model = plan.build()
    if plan.settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    own = [*callbacks, *_own_callbacks(plan, out, checkpoint)]
    trainer = FinetuneTrainer(model, arguments, learning=plan.learning, callbacks=own)
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        check_processes(checkpoint, number=trainer.args.world_size, is_sharded=trainer.is_fsdp_enabled)
        if (epochs := finished_epochs(checkpoint)) is not None:
            arguments.num_train_epochs = epochs
    with disk_errors_explained(trainer, out, checkpoints=whole_checkpoints), warnings.catch_warnings():
        # PyTorch's advice to those who change activations in place, which no layer does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        report = dict(plan.report(trainer))
        whole = _whole_model(plan, trainer)
        if trainer.is_world_process_zero():
            _leave(plan, whole, out, report, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return Outcome(out, report, is_new=True)


def checked_base(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model to start from.

    Raises:
        CheckpointError: its weights are packed.
    """
    from modernbert_decoder.config_keys import QUANTIZATION_KEY, load_config

    config = dict(load_config(folder / "config.json"))
    if config.get(QUANTIZATION_KEY) is not None:
        raise CheckpointError(f"{folder} holds quantized weights, which cannot be trained; give the original")
    return config


def _arguments(plan: FinetunePlan, folder: Path) -> TrainingArguments:
    settings, is_judged = plan.settings, plan.learning.evaluate is not None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows_per_step = settings.batch_size * settings.accumulation * processes
    num_steps = math.ceil(len(plan.learning.rows) / rows_per_step) * settings.epochs
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.rate(plan.lora),
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * num_steps),
        logging_steps=max(1, min(50, num_steps // settings.epochs)),
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if is_judged else "no",
        save_strategy="epoch",
        load_best_model_at_end=is_judged,
        metric_for_best_model=f"eval_{plan.metric}" if is_judged else None,
        greater_is_better=plan.is_greater_better if is_judged else None,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[name for name in settings.report_to if name != _TENSORBOARD] or "none",
        disable_tqdm=True,
        seed=settings.seed,
        bf16=uses_bfloat16(settings.precision),
        use_cpu=not has_accelerator(),
    )


def _own_callbacks(plan: FinetunePlan, out: Path, checkpoint: Path | None) -> list[TrainerCallback]:
    own: list[TrainerCallback] = []
    if plan.settings.patience is not None:
        own.append(EarlyStoppingCallback(early_stopping_patience=plan.settings.patience))
    if _TENSORBOARD in plan.settings.report_to and PartialState().is_main_process:
        own.append(tensorboard_callback(out, first_step=0 if checkpoint is None else step_of(checkpoint)))
    return own


def _finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of this very run, if it is done."""
    if not (out / "config.json").is_file() or _identity_of(out) != identity:
        return None
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _identity_of(out: Path) -> Any:
    try:
        return json.loads((out / _OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder this run's.

    Raises:
        InputError: it is another's.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give the name of a folder")
    remove_unfinished(out / _OPTIONS)
    if out.is_dir() and any(out.iterdir()):
        known = _identity_of(out)
        if known is None:
            raise InputError(f"{out} is not empty; choose another folder, or empty it first")
        if known != identity:
            changed = sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key))
            raise InputError(
                f"{out} holds a run that differs in {', '.join(changed)}; repeat its options to continue it, "
                "or choose another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with new_file(out / _OPTIONS) as file:
        file.write((json.dumps(identity, indent=2) + "\n").encode())


def _whole_model(plan: FinetunePlan, trainer: FinetuneTrainer) -> Any:
    """The trained model. Of a sharded one, for which all processes come here, the first gets a copy."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    model = plan.build()
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(name.endswith("decoder.weight") for name in result.missing_keys), result.missing_keys
    return model


def _leave(
    plan: FinetunePlan,
    model: Any,
    out: Path,
    report: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Writes the model, the adapter and what is said about them; `config.json` comes last.

    Raises:
        TrainingError: the last step left weights that are not finite.
    """
    model.eval()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise TrainingError(
            "the weights are no longer finite after the last step; lower the learning rate and start again "
            "in another folder"
        )
    staged = out / _STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    if plan.lora is not None:
        save_adapter(model, staged / ADAPTER_FOLDER, base=plan.base)
        model = model.merge_and_unload()
    model.save_pretrained(staged)
    if plan.lora is not None and plan.is_classifier:
        # PEFT saves no labels; the engine reads them here.
        shutil.copyfile(staged / "config.json", staged / ADAPTER_FOLDER / "config.json")
    for name in _COMPANIONS:
        if (plan.base / name).is_file() and not (staged / name).exists():
            shutil.copyfile(plan.base / name, staged / name)
    texts = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "README.md": plan.card(report, has_curve=_write_curve(plan, staged, history)),
        **plan.extras(report),
    }
    for name, text in texts.items():
        (staged / name).write_text(text, encoding="utf-8")
    make_readable(staged)
    sync_folder(staged)
    shutil.rmtree(out / ADAPTER_FOLDER, ignore_errors=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, out / path.name)
    sync_folder(out)
    _remove_leftovers(out)


def _write_curve(plan: FinetunePlan, folder: Path, history: Sequence[Mapping[str, float]]) -> bool:
    """Writes the log as a table and, where matplotlib is installed, as a picture; whether it is."""
    judged = sorted({name for entry in history for name in entry if name.startswith("eval_")})
    (folder / "curve.csv").write_text(curve_table(history, judged=judged), encoding="utf-8")
    return draw_curve(
        history,
        folder / "curve.png",
        title="Fine-tuning",
        loss_label="training loss",
        judged=(f"eval_{plan.metric}", f"validation {plan.metric}"),
    )


def _remove_leftovers(out: Path) -> None:
    """What a finished run needs no more."""
    shutil.rmtree(out / _STAGED, ignore_errors=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
