"""A recipe: everything that decides what a pretraining run does, read strictly from YAML.

The dataclasses are the schema and its documentation; what is impossible is refused here, before anything is
loaded. Knows neither PyTorch nor the data's content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from modernbert_decoder.costs import RELEASED_SIZES
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.schedules import RateSchedule

_SHAPE: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model: a released size, a shape of one's own, or the weights of a checkpoint to continue.

    Attributes:
        size: "17m", "32m", "68m", "150m", "400m" or "1b".
        checkpoint: a folder in Hugging Face format; its weights are the start.
        hidden_size: with the next three, a shape of one's own.
        intermediate_size: width of the feed-forward network.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        vocab_size: rows of the embedding; None: the tokenizer's size, rounded up to a multiple of 64.
        full_attention_every: every so manieth layer sees all earlier tokens, beginning with the first.
        window: keys that the other layers see, the token itself included. No phase changes it.
        max_position_embeddings: the longest text that the model will claim; None: the longest phase.
        attention_output_dropout: in training, after attention's output projection; not part of the model.
        saved_dtype: of the weights in the finished folder; training and its checkpoints are float32.
    """

    size: str | None = None
    checkpoint: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    vocab_size: int | None = None
    full_attention_every: int = 3
    window: int = 64
    max_position_embeddings: int | None = None
    attention_output_dropout: float = 0.0
    saved_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        shape = [name for name in _SHAPE if getattr(self, name) is not None]
        given = [name for name in ("size", "checkpoint") if getattr(self, name) is not None]
        if len(given) + bool(shape) != 1:
            stated = ", ".join([*given, *shape]) or "none of them"
            raise RecipeError(
                f"size: state one of size, checkpoint, or {', '.join(_SHAPE)}; here is {stated}"
            )
        if shape and len(shape) < len(_SHAPE):
            missing = next(name for name in _SHAPE if name not in shape)
            raise RecipeError(f"{missing}: missing beside {', '.join(shape)}; state all four")
        if self.size is not None and self.size not in RELEASED_SIZES:
            raise RecipeError(f"size is {self.size!r}; choose one of {', '.join(RELEASED_SIZES)}")
        _require_positive(self, *shape, "full_attention_every", "window")
        _require_fraction(self, "attention_output_dropout")


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """A byte-level BPE trained on the run's own data.

    Attributes:
        vocab_size: entries, the five special tokens included.
        max_bytes: text read for it, from the beginning of the shuffled data.
    """

    vocab_size: int
    max_bytes: int = 500_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < 256 + 5:
            raise RecipeError(f"vocab_size is {self.vocab_size}; 256 bytes and 5 special tokens need 261")
        _require_positive(self, "max_bytes")


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """Where the tokenizer comes from: `source`, a folder or a Hub id; or `train`, from the data."""

    source: str | None = None
    train: TokenizerTraining | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.train is None):
            raise RecipeError("source: state either it (a folder or a Hub id) or train (with a vocab_size)")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Documents and how they become sequences.

    Attributes:
        files: patterns of local files (.txt, .jsonl, .json, .parquet, the first two also .gz), relative to
            the working directory.
        exclude: patterns of files to leave out, whole paths or names.
        dataset: a name for `datasets.load_dataset`, streamed, instead of files.
        dataset_config: its configuration, if it has several.
        split: its split.
        text_key: the column or key that holds the text.
        ids_key: the one that holds token ids, for documents that are already tokenized.
        text_documents: what is a document in a text file: the file, a line, or `parts`, runs of whole lines
            of about `part_bytes` bytes.
        part_bytes: see `text_documents`.
        shuffle_documents: documents that are read ahead and shuffled; so are the sequences made of them.
        form: "packed": sequences are full and documents follow each other; "unpacked": a sequence holds one
            document, or a part of one, and is padded.
        restart_with_cls: a document that goes on in another sequence begins there with [CLS] as well.
    """

    files: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text_key: str = "text"
    ids_key: str | None = None
    text_documents: Literal["file", "line", "parts"] = "file"
    part_bytes: int = 8192
    shuffle_documents: int = 4096
    form: Literal["packed", "unpacked"] = "packed"
    restart_with_cls: bool = True

    def __post_init__(self) -> None:
        if self.files and self.dataset is not None:
            raise RecipeError("dataset: states a data set beside files; choose one of them")
        if self.exclude and not self.files:
            raise RecipeError("exclude: there are no files to exclude from; state files, or remove it")
        if self.dataset_config is not None and self.dataset is None:
            raise RecipeError("dataset_config: there is no dataset; state one, or remove it")
        _require_positive(self, "part_bytes", "shuffle_documents")


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Held-out texts, of which bits per byte are measured while training and at the end.

    Attributes:
        files: patterns of text files, each one text in plain UTF-8.
        window: tokens of a window; each token is predicted from its own window only.
        every_steps: how often while training; None: only at the end of a phase.
        max_windows: of these, evenly spread, while training; None: all. The end of a phase takes all.
    """

    files: tuple[str, ...]
    window: int = 512
    every_steps: int | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise RecipeError("files is empty; name held-out files, or remove the section evaluation")
        if self.window < 2:
            raise RecipeError(f"window is {self.window}, but must be 2 at least")
        _require_positive(self, "every_steps", "max_windows")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """StableAdamW. `learning_rate` is the peak; `weight_decay` is fully decoupled from it."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "eps")
        if not 0 <= self.weight_decay < 1:
            raise RecipeError(f"weight_decay is {self.weight_decay}, but must be from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas is {list(self.betas)}, but both must be from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class PhaseRecipe:
    """A stretch of the run. Weights and optimizer state come from the phase before.

    Attributes:
        name: of the phase, for its folder and the logs.
        tokens: to train on. A sequence counts as its full length.
        sequence_length: in tokens.
        rope_base: of full and sliding layers; null: those that the checkpoint has.
        batch_sequences: sequences of a step.
        batch_warmup_tokens: tokens over which the batch grows to that.
        batch_warmup_start: sequences of the first step; needed for a batch warm-up.
        warmup_tokens: tokens over which the learning rate rises from 0 to the peak.
        decay_tokens: tokens at the end over which it falls, 1-sqrt, to `final_rate`.
        final_rate: the learning rate at the end, as a fraction of the peak. A phase without a warm-up starts
            where the one before ended.
        data: another data section for this phase.
    """

    name: str
    tokens: int
    sequence_length: int
    batch_sequences: int
    rope_base: float | None = 10_000.0
    batch_warmup_tokens: int = 0
    batch_warmup_start: int | None = None
    warmup_tokens: int = 0
    decay_tokens: int = 0
    final_rate: float | None = None
    data: DataRecipe | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "tokens", "batch_sequences", "rope_base", "batch_warmup_start")
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise RecipeError(f"name is {self.name!r}; use letters, digits, - and _: it names a folder")
        if self.sequence_length < 2:
            raise RecipeError(f"sequence_length is {self.sequence_length}, but must be 2 at least")
        if self.warmup_tokens < 0 or self.decay_tokens < 0 or self.batch_warmup_tokens < 0:
            raise RecipeError("warmup_tokens, decay_tokens and batch_warmup_tokens must not be negative")
        if self.warmup_tokens + self.decay_tokens > self.tokens:
            raise RecipeError(
                f"warmup_tokens: {self.warmup_tokens:,} and decay_tokens {self.decay_tokens:,} are more than "
                f"the phase's {self.tokens:,} tokens; shorten one of them or lengthen the phase"
            )
        if (self.batch_warmup_tokens > 0) != (self.batch_warmup_start is not None):
            raise RecipeError("batch_warmup_start: it and batch_warmup_tokens need each other; state both")
        if self.batch_warmup_start is not None and self.batch_warmup_start > self.batch_sequences:
            raise RecipeError(
                f"batch_warmup_start is {self.batch_warmup_start}, more than batch_sequences "
                f"({self.batch_sequences}); a batch warm-up grows"
            )
        if (self.decay_tokens > 0) != (self.final_rate is not None):
            raise RecipeError("final_rate: a decay needs decay_tokens and this; state both, or neither")
        if self.final_rate is not None and not 0 <= self.final_rate <= 1:
            raise RecipeError(
                f"final_rate is {self.final_rate}, but must be a fraction of the peak, from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """How the run is carried out; all but `seed` and `precision` may change when it is resumed.

    Attributes:
        seed: of the weights, the order of the data, and dropout.
        precision: "auto": bfloat16 where the hardware has it (on a CPU: float32). Weights, optimizer state
            and the loss are float32 in any case.
        micro_batch_tokens: at most so many tokens go through a device at once; a step takes as many rounds as
            its batch needs.
        sequence_multiple: batches are whole multiples of this, and the number of processes divides it.
        checkpoint_every_steps: steps between checkpoints; there is one at the end of each phase as well.
        keep_checkpoints: the newest so many are kept.
        log_every_steps: steps between lines of the log.
        report_to: "tensorboard", "trackio", "wandb" or others that `transformers` knows.
        attention: the implementation; "sdpa" separates packed documents on every device.
        threads: of the CPU; None: PyTorch's choice.
        peak_flops: of one device, for model FLOPs utilisation; None: measured.
        prefetch_steps: batches made ready by a thread beside the training.
        gradient_checkpointing: compute layers twice to hold fewer activations.
    """

    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_tokens: int = 16_384
    sequence_multiple: int = 1
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 3
    log_every_steps: int = 10
    report_to: tuple[str, ...] = ()
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    threads: int | None = None
    peak_flops: float | None = None
    prefetch_steps: int = 2
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("micro_batch_tokens", "sequence_multiple", "checkpoint_every_steps", "keep_checkpoints"),
            *("log_every_steps", "threads", "peak_flops", "prefetch_steps"),
        )
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}, but must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole pretraining run. `name` and `description` go into the model card."""

    name: str
    model: ModelRecipe
    tokenizer: TokenizerRecipe
    optimizer: OptimizerRecipe
    phases: tuple[PhaseRecipe, ...]
    data: DataRecipe = field(default_factory=DataRecipe)
    evaluation: EvaluationRecipe | None = None
    run: RunRecipe = field(default_factory=RunRecipe)
    description: str = ""

    def __post_init__(self) -> None:
        if not self.phases:
            raise RecipeError("phases is empty; state one at least")
        names = [phase.name for phase in self.phases]
        for i, phase in enumerate(self.phases):
            self._check_phase(i, phase, names)
        if self.tokenizer.train is not None and self.model.checkpoint is not None:
            raise RecipeError("tokenizer.train: the weights of model.checkpoint have a tokenizer; use source")

    def _check_phase(self, i: int, phase: PhaseRecipe, names: list[str]) -> None:
        if names.count(phase.name) > 1:
            raise RecipeError(f"phases[{i}].name: {phase.name!r} is there twice; give each its own")
        if i > 0 and phase.warmup_tokens == 0 and phase.final_rate is not None:
            before = rate_schedule(self, i).plateau
            if phase.final_rate > before:
                raise RecipeError(
                    f"phases[{i}].final_rate is {phase.final_rate}, more than {before}, where the phase "
                    "before ends; a decay falls"
                )
        longest = self.model.max_position_embeddings
        if longest is not None and phase.sequence_length > longest:
            raise RecipeError(
                f"phases[{i}].sequence_length is {phase.sequence_length}, longer than "
                f"model.max_position_embeddings ({longest}); raise that or shorten the sequences"
            )
        multiple = self.run.sequence_multiple
        for key, count in (
            ("batch_sequences", phase.batch_sequences),
            ("batch_warmup_start", phase.batch_warmup_start),
        ):
            if count is not None and count % multiple:
                raise RecipeError(
                    f"phases[{i}].{key} is {count}, no multiple of run.sequence_multiple ({multiple}); "
                    "change one of them"
                )
        if phase.sequence_length > self.run.micro_batch_tokens:
            raise RecipeError(
                f"run.micro_batch_tokens is {self.run.micro_batch_tokens}, less than one sequence of "
                f"phases[{i}] ({phase.sequence_length} tokens); raise it"
            )

    @property
    def max_position_embeddings(self) -> int:
        """The longest text that the model will claim."""
        stated = self.model.max_position_embeddings
        return max(phase.sequence_length for phase in self.phases) if stated is None else stated

    def data_of(self, phase: int) -> DataRecipe:
        """The data section that a phase reads."""
        own = self.phases[phase].data
        return self.data if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `read_recipe` reads it, every key stated."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def rate_schedule(recipe: Recipe, phase: int) -> RateSchedule:
    """The learning-rate schedule of a phase, relative to the peak."""
    level = 1.0
    for earlier in recipe.phases[:phase]:
        if earlier.final_rate is not None:
            level = earlier.final_rate
        elif earlier.warmup_tokens:
            level = 1.0
    own = recipe.phases[phase]
    if own.warmup_tokens:
        level = 1.0
    return RateSchedule(
        tokens=own.tokens,
        warmup_tokens=own.warmup_tokens,
        decay_tokens=own.decay_tokens,
        plateau=level,
        final=level if own.final_rate is None else own.final_rate,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _require_positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise RecipeError(f"{name} is {value}, but must be positive")


def _require_fraction(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < 1:
            raise RecipeError(f"{name} is {value}, but must be from 0 to below 1")
