"""Cross-objective training: an encoder goes on as a decoder, or a decoder as an encoder.

Weights move by `conversion/`, bit for bit; the decoder is then a pretraining run like any other, and the
encoder one with another model and other targets. Knows no command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Final, Literal

from accelerate import PartialState
from torch import Tensor, nn

from modernbert_decoder.architecture import RELEASED_SIZES, DecoderArchitecture
from modernbert_decoder.atomic_files import new_file, remove_unfinished, write_folder
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.config_keys import load_config
from modernbert_decoder.conversion.convert import convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind, encoder_as_decoder_config, kind_of
from modernbert_decoder.errors import InputError
from modernbert_decoder.training.batches import StepBatches
from modernbert_decoder.training.checkpoints import log_history_of, step_of
from modernbert_decoder.training.curve import curve_table, draw_curve
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.masked_encoder import MaskedNextTokenEncoder, plain_encoder
from modernbert_decoder.training.masking import MaskedStepBatches, Masking
from modernbert_decoder.training.precision import has_accelerator
from modernbert_decoder.training.pretraining import PretrainingRun, RunResult, pretrain
from modernbert_decoder.training.progress import Write
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.trainer import PretrainingTrainer

RECIPE: Final = "cross"
MASK_SHARE: Final = 0.15
_START: Final = ".start"
_IDENTITY: Final = "cross.json"
# Of the log, those whose mean a card states: single ones go up and down.
_LAST_LOSSES: Final = 10

Objective = Literal["decoder", "encoder"]


def cross(
    model: str | Path,
    out: Path,
    *,
    to: Objective,
    recipe: str | Path = RECIPE,
    changes: Iterable[str] = (),
    mask_share: float = MASK_SHARE,
    revision: str | None = None,
    write: Write,
    shows_bar: bool = False,
) -> RunResult:
    """Trains, or goes on training, in the folder `out`; the model is in its folder `model`.

    Args:
        model: an encoder (to "decoder") or a decoder (to "encoder"): folder or Hub id.
        out: the folder of the run.
        to: what the model shall become.
        recipe: a recipe; its model, tokenizer and form of data are replaced, and with the ready one the
            learning rate (half the peak of the released model of these sizes) and the weight decay.
        changes: `key=value` each, as for `read_recipe`.
        mask_share: of an encoder's tokens, those that are hidden.
        revision: on the Hub.
        write: takes lines of progress.
        shows_bar: draw a bar instead.

    Raises:
        UserError: the model is of the wanted kind already, or anything that stops a pretraining run.
    """
    out = Path(os.path.abspath(out.expanduser()))  # the recipe names a folder in it
    source = find_checkpoint(model, revision=revision)
    processes = PartialState(cpu=not has_accelerator())
    if processes.is_main_process:
        _prepare(source, out, to=to, mask_share=mask_share)
    processes.wait_for_everyone()
    start = out / _START
    changes = list(changes)
    architecture = _architecture(start, to)
    read = read_recipe(recipe, changes=[*_own_changes(recipe, start, architecture, changes, to=to), *changes])
    if to == "decoder":
        return pretrain(read, out, write=write, shows_bar=shows_bar)
    _check_encoder_recipe(read)
    run_type = partial(EncoderRun, architecture=architecture, mask_share=mask_share)
    return pretrain(read, out, write=write, shows_bar=shows_bar, run_type=run_type)


def _prepare(source: Path, out: Path, *, to: Objective, mask_share: float) -> None:
    """Puts the converted model into the folder of the run, which finds it there when it is continued.

    Raises:
        InputError: the folder is another run's.
    """
    config = load_config(source / "config.json")
    kind, wanted = kind_of(config, source=str(source / "config.json")), CheckpointKind(to)
    if kind is wanted:
        going_on = "mbd train pretrain" if to == "decoder" else "transformers"
        raise InputError(f"{source} is in {to} format already; to go on training it use {going_on}")
    status = (source / "config.json").stat()
    identity = {"source": str(source.resolve()), "to": to, "mask_share": mask_share, "size": status.st_size}
    path, start = out / _IDENTITY, out / _START
    for each in (start, path):
        remove_unfinished(each)
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != identity:
            changed = ", ".join(sorted(key for key in identity if known.get(key) != identity[key]))
            raise InputError(f"{out} holds a run that differs in {changed}; choose another folder")
    elif out.is_dir() and any(entry.name != _START for entry in out.iterdir()):
        raise InputError(f"{out} is not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not start.is_dir():
        convert_checkpoint(source, start, to=wanted)
    with new_file(path) as file:
        file.write((json.dumps(identity, indent=2) + "\n").encode())


def _architecture(folder: Path, to: Objective) -> DecoderArchitecture:
    config: Mapping[str, Any] = load_config(folder / "config.json")
    where = str(folder / "config.json")
    if to == "encoder":
        config = encoder_as_decoder_config(config, source=where)
    return DecoderArchitecture.from_config(config, source=where)


def _own_changes(
    recipe: str | Path,
    start: Path,
    architecture: DecoderArchitecture,
    changes: Iterable[str],
    *,
    to: Objective,
) -> list[str]:
    """What the model decides of a recipe."""
    own = [f"model.checkpoint={str(start)!r}", f"tokenizer.source={str(start)!r}"]
    if to == "encoder":
        own.append("data.form=unpacked")
    if str(recipe) != RECIPE:
        return own
    stated = {change.partition("=")[0].strip() for change in changes}
    size = next((name for name, size in RELEASED_SIZES.items() if _has_size(architecture, size)), None)
    if size is not None:
        released = read_recipe(f"ettin-{size}").optimizer
        own.append(f"optimizer.learning_rate={released.learning_rate / 2}")
        own.append(f"optimizer.weight_decay={released.weight_decay}")
    elif "optimizer.learning_rate" not in stated:
        raise InputError(
            "this model has no released size, so that its peak learning rate is not known; state half of it, "
            "such as --set optimizer.learning_rate=5e-4"
        )
    longest = architecture.max_position_embeddings
    if "phases.0.sequence_length" not in stated:
        length = min(read_recipe(RECIPE).phases[0].sequence_length, longest)
        own.append(f"phases.0.sequence_length={length}")
    return own


def _has_size(architecture: DecoderArchitecture, size: tuple[int, ...]) -> bool:
    a = architecture
    return size == (a.num_hidden_layers, a.hidden_size, a.intermediate_size, a.num_attention_heads)


def _check_encoder_recipe(recipe: Recipe) -> None:
    """Refuses what means nothing to an encoder.

    Raises:
        RecipeError: names the key.
    """
    if recipe.evaluation is not None:
        raise RecipeError(
            "evaluation: bits per byte are those of next tokens, which an encoder does not predict; remove it"
        )
    for i, phase in enumerate(recipe.phases):
        if phase.rope_base is not None:
            raise RecipeError(f"phases[{i}].rope_base: an encoder keeps its bases; set it to null")
        if recipe.data_of(i).form != "unpacked":
            raise RecipeError(f"phases[{i}].data.form: packed texts would see each other; set it to unpacked")


class MaskedTrainer(PretrainingTrainer):
    """The trainer of decoders with an encoder in it."""

    @property
    def decoder(self) -> Any:
        """The model itself, without what processes wrap around it."""
        return self.accelerator.unwrap_model(self.model)

    def _enter_phase(self, phase: int) -> None:
        self._phase = phase  # the bases stay

    def _training_flops(self) -> float:
        """Per token of the last step: every position sees the whole sequence, and the head is computed where
        one is hidden.
        """
        config = self.decoder.config.to_dict()
        decoder = encoder_as_decoder_config(
            {**config, "architectures": ["ModernBertForMaskedLM"]}, source="the model"
        )
        architecture = DecoderArchitecture.from_config(decoder, source="the model")
        batches = self.train_dataset
        assert isinstance(batches, MaskedStepBatches)
        body = architecture.flops_per_token(self._mean_length, with_head=False)
        head = architecture.flops_per_token(self._mean_length) - body
        return 3.0 * (body + batches.masking.share * head)


class EncoderRun(PretrainingRun):
    """A run whose model is an encoder that learns hidden tokens."""

    trainer_type: ClassVar[type[PretrainingTrainer]] = MaskedTrainer

    def __init__(
        self, *arguments: Any, architecture: DecoderArchitecture, mask_share: float, **options: Any
    ) -> None:
        """Arguments of `PretrainingRun`, and which share of the tokens is hidden."""
        self.architecture = architecture
        self.mask_share = mask_share
        super().__init__(*arguments, **options)

    def build(self) -> Any:
        """The converted model, in float32."""
        import torch

        recipe = self.recipe
        assert recipe.model.checkpoint is not None
        model = MaskedNextTokenEncoder.from_pretrained(
            recipe.model.checkpoint, dtype=torch.float32, attn_implementation=recipe.run.attention
        )
        for layer in model.model.layers:
            layer.attn.out_drop = nn.Dropout(recipe.model.attention_output_dropout)
        if recipe.run.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        return model

    @property
    def batches_type(self) -> Callable[..., StepBatches]:
        """What makes batches of documents."""
        tokenizer = self.tokenizer
        if tokenizer.mask_token_id is None:
            raise RecipeError("the tokenizer has no [MASK], which stands for hidden tokens; add it")
        special = {
            token_id
            for token_id, token in tokenizer.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        special |= {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
        masking = Masking(
            share=self.mask_share,
            mask_token_id=tokenizer.mask_token_id,
            num_ids=tokenizer.vocab_size,
            special_ids=tuple(sorted(special)),
            seed=self.recipe.run.seed,
        )
        return partial(MaskedStepBatches, masking=masking)

    def _write_model(self, phase: int, checkpoint: Path, state: dict[str, Tensor]) -> None:
        import torch

        folder = self.phase_folder(phase)
        model = plain_encoder(self.trainer.decoder.config, state)
        model.to(getattr(torch, self.recipe.model.saved_dtype))
        history = log_history_of(checkpoint)
        tokens = self.plan.tokens_after(step_of(checkpoint))

        def write(target: Path) -> None:
            model.save_pretrained(target)
            self._write_extras(target)
            (target / "curve.csv").write_text(curve_table(history), encoding="utf-8")
            label = "training loss (nats per hidden token)"
            has_curve = draw_curve(history, target / "curve.png", title=self.recipe.name, loss_label=label)
            card = encoder_card(
                self.recipe,
                self.architecture,
                tokens=tokens,
                mask_share=self.mask_share,
                losses=[entry["loss"] for entry in history if "loss" in entry],
                has_curve=has_curve,
            )
            (target / "README.md").write_text(card, encoding="utf-8")

        write_folder(folder, write, overwrite=True)


def encoder_card(
    recipe: Recipe,
    architecture: DecoderArchitecture,
    *,
    tokens: int,
    mask_share: float,
    losses: Sequence[float],
    has_curve: bool,
) -> str:
    """The card of an encoder in Markdown; `losses` are those of the log, the last ones last."""
    last = losses[-_LAST_LOSSES:]
    evaluation = curve = ""
    if last:
        evaluation = (
            f"\n\n## Evaluation\n\nLoss of hidden tokens in training, over the last {len(last)} entries of "
            f"`curve.csv`: {fmean(last):.4f} nats per token. No text was held out."
        )
    if has_curve:
        curve = "\n\n![Loss](curve.png)"
    a, phase = architecture, recipe.phases[-1]
    files = ", ".join(f"`{pattern}`" for pattern in recipe.data.files) or f"`{recipe.data.dataset}`"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n"
        f"# {recipe.name}\n\nA ModernBERT encoder of {a.num_hidden_layers} layers of width {a.hidden_size} "
        "that was a decoder. It was trained with the masked next-token objective: "
        f"{mask_share:.0%} of the tokens are hidden (of these 80 % by `[MASK]`, 10 % by another token), and "
        "the head at the position *before* a hidden token tells it. `fill-mask` pipelines look at the hidden "
        "position itself; shift by one.\n\n"
        "## Use\n\n```python\nfrom transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained(".")\n```\n\n'
        f"## Data\n\n{files}, {tokens / 1e6:,.1f} M tokens, each document in sequences of its own of at most "
        f"{phase.sequence_length:,} tokens.\n\n"
        f"## Training\n\nStableAdamW, peak learning rate {recipe.optimizer.learning_rate:g}, weight decay "
        f"{recipe.optimizer.weight_decay:g}; warm-up over {phase.warmup_tokens:,} tokens, 1-sqrt decay over "
        f"the last {phase.decay_tokens:,}. The whole recipe is in `recipe.yaml`.{curve}{evaluation}\n"
    )
