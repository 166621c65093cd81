"""A pretraining run from its recipe to its model folder, resumable at every step.

Puts the parts of this room together. What a run computes is decided by the recipe alone: not by when it was
interrupted nor by how many processes share the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from modernbert_decoder.errors import InputError
from modernbert_decoder.training import run_folder
from modernbert_decoder.training.batches import Share, StepBatches
from modernbert_decoder.training.building import build_model, load_weights
from modernbert_decoder.training.checkpoints import (
    STAGING,
    CheckpointWriter,
    cursor_of,
    latest_checkpoint,
    log_history_of,
    step_of,
)
from modernbert_decoder.training.disk_errors import disk_errors_explained
from modernbert_decoder.training.documents import matching_files, open_source
from modernbert_decoder.training.encoding import DocumentEncoder
from modernbert_decoder.training.errors import RecipeError, TrainingError
from modernbert_decoder.training.finishing import stored_evaluations, write_model_folder
from modernbert_decoder.training.held_out import HeldOutTexts
from modernbert_decoder.training.model_card import Evaluation
from modernbert_decoder.training.optimizer import OptimizerSettings
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.precision import has_accelerator, measured_peak_flops, uses_bfloat16
from modernbert_decoder.training.progress import PlanProgress, Write
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.reporting import EvaluateEvery, check_reporting, tensorboard_callback
from modernbert_decoder.training.sequences import Cursor
from modernbert_decoder.training.tokenizer_training import TrainingTokenizer
from modernbert_decoder.training.trainer import PretrainingTrainer, TrainerSettings, set_rope_base


@dataclass(frozen=True)
class RunResult:
    """What a run, or the part of it that was asked for, led to.

    Attributes:
        folder: of the model.
        steps: that it has taken, earlier starts included.
        tokens: that it has seen.
        evaluations: of the model, where the recipe names held-out texts.
    """

    folder: Path
    steps: int
    tokens: int
    evaluations: tuple[Evaluation, ...]


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    stop_after: str | None = None,
    write: Write,
    shows_bar: bool = False,
    run_type: Callable[..., PretrainingRun] | None = None,
) -> RunResult:
    """Train, or go on training, in the folder `out`.

    Args:
        recipe: what to do.
        out: the folder of the run: checkpoints, one model folder per phase, and `model`, the last of them.
        stop_after: a phase behind which to stop; the same call without it goes on. Where that phase is over
            nothing is trained, and the result is its model.
        write: takes lines of progress.
        shows_bar: draw a bar instead.
        run_type: another kind of run; None: that of a language model.

    Raises:
        UserError: the recipe, the data or the folder cannot be used, the disk is full, or the loss is no
            number. The last checkpoint is whole in any case, and the same call goes on from it.
    """
    plan = Plan(recipe)
    last_phase = _phase_number(recipe, stop_after)
    check_reporting(recipe.run.report_to)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    args = _training_arguments(recipe, plan, out)
    processes = PartialState()
    _check_processes(recipe, processes.num_processes)
    with run_folder.locked(out) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            run_folder.prepare(recipe, plan, out)
        processes.wait_for_everyone()
        run = (run_type or PretrainingRun)(
            recipe, plan, out, args=args, last_phase=last_phase, write=write, shows_bar=shows_bar
        )
        return run.complete()


class PretrainingRun:
    """One process's part of a run; `cross.py` changes what is learned, and how the model is written."""

    trainer_type: ClassVar[type[PretrainingTrainer]] = PretrainingTrainer

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        out: Path,
        *,
        args: TrainingArguments,
        last_phase: int,
        write: Write,
        shows_bar: bool,
    ) -> None:
        self.recipe = recipe
        self.plan = plan
        self.out = out
        self.last_phase = last_phase
        self._write = write
        self._write_extras = partial(run_folder.write_extras, out)
        self.tokenizer = run_folder.run_tokenizer(out)
        self.held_out = _held_out(recipe, self.tokenizer)
        self.checkpoint = latest_checkpoint(out)
        self.steps_before = 0 if self.checkpoint is None else step_of(self.checkpoint)
        self.model = self.build()
        self.progress = PlanProgress(plan, write=write, shows_bar=shows_bar)
        self.writer = CheckpointWriter(
            out,
            plan,
            every_steps=recipe.run.checkpoint_every_steps,
            keep=recipe.run.keep_checkpoints,
            stop_after_phase=last_phase,
            write_extras=self._write_extras,
        )
        self.writer.run = self
        self.trainer = self._make_trainer(args)

    def build(self) -> Any:
        """The model with its first weights."""
        return build_model(self.recipe, self.tokenizer)

    @property
    def batches_type(self) -> Callable[..., StepBatches]:
        """What makes batches of documents."""
        return StepBatches

    @property
    def cursor(self) -> Cursor | None:
        """Where the data stands."""
        return self.trainer.cursor

    def wait_for_everyone(self) -> None:
        """Returns when all processes have come here."""
        self.trainer.accelerator.wait_for_everyone()

    def complete(self) -> RunResult:
        """Trains what is left, and writes what is missing."""
        if self.checkpoint is not None:
            self._write(f"going on behind step {self.steps_before:,} ({self.checkpoint})")
            self._finish_interrupted(self.checkpoint)
        if self.steps_before < self.plan.first_step_of(self.last_phase + 1):
            self._train()
        elif self.steps_before > self.plan.first_step_of(self.last_phase + 1):
            self._check_phase_left()
        end = self.plan.first_step_of(self.last_phase + 1)
        steps = min(max(self.trainer.state.global_step, self.steps_before), end)
        folder = self.phase_folder(self.plan.step(steps - 1).phase)
        return RunResult(folder, steps, self.plan.tokens_after(steps), tuple(stored_evaluations(folder)))

    def phase_folder(self, phase: int) -> Path:
        """Where the model of a phase goes."""
        if phase == len(self.plan.phases) - 1:
            return self.out / "model"
        return self.out / "phases" / f"{phase + 1}-{self.plan.phases[phase].name}"

    def finish_phase(self, phase: int, checkpoint: Path) -> None:
        """Writes the model of a phase whose last step has been taken; all processes come here."""
        trainer = self.trainer
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if trainer.accelerator.is_main_process:
            whole = trainer.decoder.state_dict() if state is None else state
            self._write_model(phase, checkpoint, whole)
        self.wait_for_everyone()

    def _train(self) -> None:
        resumed = None if self.checkpoint is None else str(self.checkpoint)
        if self.checkpoint is not None:
            self._check_sharding(self.checkpoint)
        try:
            with disk_errors_explained(self.writer, self.out), warnings.catch_warnings():
                # PyTorch's advice to those who change activations in place, which no layer does.
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
                self.trainer.train(resume_from_checkpoint=resumed)
        finally:
            self.progress.close()

    def _finish_interrupted(self, checkpoint: Path) -> None:
        """Writes the model of a phase if its last checkpoint is there, but the process was killed then."""
        step = self.plan.step(self.steps_before - 1)
        is_missing = step.is_last_of_phase and not self._is_written(step.phase)
        if is_missing and self.trainer.accelerator.is_main_process:
            load_weights(self.model, checkpoint)
            with disk_errors_explained(self.writer, self.out):
                self._write_model(step.phase, checkpoint, self.model.state_dict())
        self.wait_for_everyone()

    def _is_written(self, phase: int) -> bool:
        """Whether the model of a phase that has just ended stands in its folder.

        It may be that of an earlier end, behind which the phase was lengthened or another one added; the
        recipe beside it tells.
        """
        folder = self.phase_folder(phase)
        path = folder / run_folder.RECIPE_FILE
        if not path.is_file():
            return False
        then = read_recipe(path)
        number = len(then.phases) if folder.name == "model" else phase + 1
        return Plan(then).first_step_of(number) == self.steps_before

    def _write_model(self, phase: int, checkpoint: Path, state: dict[str, Any]) -> None:
        base = self.plan.phases[phase].rope_base
        if base is not None:
            set_rope_base(self.trainer.decoder, base)
        folder = self.phase_folder(phase)
        evaluations = write_model_folder(
            folder,
            recipe=self.recipe,
            config=self.trainer.decoder.config,
            state=state,
            held_out=self.held_out,
            history=log_history_of(checkpoint),
            num_phases=phase + 1,
            tokens=self.plan.tokens_after(step_of(checkpoint)),
            epochs=cursor_of(checkpoint).place.epoch + 1,
            write_extras=self._write_extras,
        )
        for entry in evaluations:
            self._write(f"{folder.name}: {entry.bits_per_byte:.4f} bits per held-out byte in {entry.dtype}")

    def _make_trainer(self, args: TrainingArguments) -> PretrainingTrainer:
        recipe = self.recipe
        run, evaluation = recipe.run, recipe.evaluation
        share = Share(
            process=args.process_index,
            num_processes=args.world_size,
            micro_batch_tokens=run.micro_batch_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            is_flat="flash" in run.attention,
        )
        batches = self.batches_type(
            recipe,
            self.plan,
            self.tokenizer,
            share,
            open_source=open_source,
            first_step=self.steps_before,
            cursor=None if self.checkpoint is None else cursor_of(self.checkpoint),
        )
        peak = run.peak_flops or measured_peak_flops(args.device, is_bfloat16=args.bf16)
        settings = TrainerSettings(
            optimizer=OptimizerSettings(
                learning_rate=recipe.optimizer.learning_rate,
                weight_decay=recipe.optimizer.weight_decay,
                betas=recipe.optimizer.betas,
                eps=recipe.optimizer.eps,
            ),
            peak_flops=peak * args.world_size,
            held_out=self.held_out,
            max_windows=None if evaluation is None else evaluation.max_windows,
            tokens_at_once=run.micro_batch_tokens,
        )
        callbacks: list[TrainerCallback] = [self.progress, self.writer]
        if evaluation is not None and evaluation.every_steps is not None:
            callbacks.insert(0, EvaluateEvery(evaluation.every_steps))
        if "tensorboard" in run.report_to and args.process_index == 0:
            callbacks.append(tensorboard_callback(self.out, first_step=self.steps_before))
        trainer = self.trainer_type(
            self.model, args, plan=self.plan, batches=batches, settings=settings, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _check_phase_left(self) -> None:
        """Says that the run is past the phase to stop after, of which only the model can be asked for.

        Raises:
            TrainingError: that has been removed.
        """
        name, end = self.plan.phases[self.last_phase].name, self.plan.first_step_of(self.last_phase + 1)
        where = f"phase {name} ended with step {end:,}, and the run is at step {self.steps_before:,}"
        folder = self.phase_folder(self.last_phase)
        if not folder.is_dir():
            raise TrainingError(f"{where}; {folder} is gone. Go on without --stop-after, or start a new run")
        self._write(f"{where}: nothing to do")

    def _check_sharding(self, checkpoint: Path) -> None:
        is_sharded = not (checkpoint / "optimizer.pt").is_file()
        if is_sharded != self.trainer.is_fsdp_enabled:
            written, here = ("sharded (FSDP)", "not") if is_sharded else ("not sharded", "sharded")
            raise TrainingError(
                f"{checkpoint} was written by a run that was {written}, and this one is {here}; start it "
                "with the same launcher settings"
            )


def _training_arguments(recipe: Recipe, plan: Plan, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / STAGING),
        max_steps=plan.num_steps,
        per_device_train_batch_size=1,  # a step's batch comes whole, in rounds of its own
        gradient_accumulation_steps=1,
        learning_rate=recipe.optimizer.learning_rate,
        max_grad_norm=0.0,  # the optimizer clips its updates instead
        logging_steps=recipe.run.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",  # `CheckpointWriter` asks for it
        eval_strategy="no",
        seed=recipe.run.seed,
        bf16=uses_bfloat16(recipe.run.precision),
        use_cpu=not has_accelerator(),
        report_to=[name for name in recipe.run.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
        log_level="error",
        ignore_data_skip=True,  # the cursor knows where to go on
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def _held_out(recipe: Recipe, tokenizer: TrainingTokenizer) -> HeldOutTexts | None:
    if recipe.evaluation is None:
        return None
    encoder = DocumentEncoder(
        tokenizer.tokenizer, cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id
    )
    files = matching_files(recipe.evaluation.files)
    return HeldOutTexts.read(files, encoder, window=recipe.evaluation.window)


def _phase_number(recipe: Recipe, name: str | None) -> int:
    names = [phase.name for phase in recipe.phases]
    if name is None:
        return len(names) - 1
    if name not in names:
        raise InputError(f"there is no phase {name!r} to stop after; the recipe has {', '.join(names)}")
    return names.index(name)


def _check_processes(recipe: Recipe, num_processes: int) -> None:
    multiple = recipe.run.sequence_multiple
    if num_processes > 1 and multiple % num_processes:
        raise RecipeError(
            f"run.sequence_multiple is {multiple}, but there are {num_processes} processes, which share "
            f"every batch evenly; set it to a multiple of {num_processes}"
        )
