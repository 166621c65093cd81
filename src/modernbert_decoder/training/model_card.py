"""The README.md of a trained model: what it is, what it saw, how it was trained, how good it is.

Knows recipes and results; what is in them was decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.training.recipe import DataRecipe, Recipe


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte in one number format."""

    dtype: str
    bits_per_byte: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card states beside the recipe.

    Attributes:
        architecture: of the model.
        num_phases: finished ones.
        tokens: trained on.
        epochs: over the data of the last phase, the one that is begun included.
        evaluations: one for each number format.
        num_bytes: of the held-out texts.
        has_curve: whether curve.png stands beside the card.
        folder: what to call the model in examples.
    """

    architecture: DecoderArchitecture
    num_phases: int
    tokens: int
    epochs: int
    evaluations: Sequence[Evaluation]
    num_bytes: int
    has_curve: bool
    folder: str


def model_card(recipe: Recipe, facts: CardFacts) -> str:
    """The card in Markdown."""
    sections = [
        _header(recipe, facts),
        _use(facts),
        _data(recipe, facts),
        _training(recipe, facts),
        _evaluation(recipe, facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(recipe: Recipe, facts: CardFacts) -> str:
    a = facts.architecture
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- modernbert-decoder\n---"
    text = (
        f"A ModernBERT decoder of {a.num_parameters() / 1e6:,.1f} M parameters: {a.num_hidden_layers} layers "
        f"of width {a.hidden_size} ({a.num_full_layers} of them see the whole text, the others the last "
        f"{a.window} tokens), a vocabulary of {a.vocab_size:,}, texts of up to "
        f"{a.max_position_embeddings:,} tokens. Weights are {recipe.model.saved_dtype}."
    )
    described = f"\n\n{recipe.description.strip()}" if recipe.description.strip() else ""
    return f"{front}\n\n# {recipe.name}\n\n{text}{described}"


def _use(facts: CardFacts) -> str:
    return f'## Use\n\n```bash\nmbd generate --model {facts.folder} "Once upon a time"\n```'


def _data(recipe: Recipe, facts: CardFacts) -> str:
    sections = dict.fromkeys(recipe.data_of(i) for i in range(facts.num_phases))
    lines = "\n".join(f"- {_described(data)}" for data in sections)
    passes = "one pass" if facts.epochs == 1 else f"{facts.epochs} passes"
    return (
        f"## Data\n\n{lines}\n\n{facts.tokens / 1e6:,.1f} M tokens in all, {passes} over the data at the end."
    )


def _described(data: DataRecipe) -> str:
    if data.dataset is not None:
        name = " ".join(part for part in (data.dataset, data.dataset_config) if part)
        where = f"`{name}`, split `{data.split}`"
    else:
        where = ", ".join(f"`{pattern}`" for pattern in data.files)
    without = f" without {', '.join(f'`{pattern}`' for pattern in data.exclude)}" if data.exclude else ""
    form = "packed" if data.form == "packed" else "one document a sequence, padded"
    return f"{where}{without}; documents as `[CLS] ... [SEP]`, {form}"


def _training(recipe: Recipe, facts: CardFacts) -> str:
    rows = []
    for phase in recipe.phases[: facts.num_phases]:
        end = "" if phase.final_rate is None else f"{phase.final_rate:g}"
        base = "as it was" if phase.rope_base is None else f"{phase.rope_base:,.0f}"
        rows.append(
            f"| {phase.name} | {phase.tokens / 1e6:,.1f} | {phase.sequence_length:,} | "
            f"{base} | {phase.batch_sequences:,} | {end} |"
        )
    optimizer = recipe.optimizer
    text = (
        f"StableAdamW, peak learning rate {optimizer.learning_rate:g}, fully decoupled weight decay "
        f"{optimizer.weight_decay:g} (none on norms and biases), betas {optimizer.betas[0]:g} and "
        f"{optimizer.betas[1]:g}, eps {optimizer.eps:g}. The whole recipe is in `recipe.yaml`."
    )
    header = (
        "| phase | M tokens | length | RoPE base | sequences a step | ends at, of the peak |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    curve = "\n\n![Loss and held-out bits per byte](curve.png)" if facts.has_curve else ""
    return f"## Training\n\n{text}\n\n{header}\n" + "\n".join(rows) + curve


def _evaluation(recipe: Recipe, facts: CardFacts) -> str:
    if recipe.evaluation is None or not facts.evaluations:
        return ""
    names = ", ".join(f"`{pattern}`" for pattern in recipe.evaluation.files)
    window = recipe.evaluation.window
    text = (
        f"Held-out texts: {names}, {facts.num_bytes:,} bytes. Each text as `[CLS] text [SEP]`, all "
        f"concatenated; windows of {window} tokens stepping by {window - 1}, each token "
        "predicted from its own window only."
    )
    rows = "\n".join(
        f"| {entry.dtype} | {entry.bits_per_byte:.4f} | {entry.perplexity:.2f} |"
        for entry in facts.evaluations
    )
    return f"## Evaluation\n\n{text}\n\n| weights | bits per byte | perplexity |\n|---|---:|---:|\n{rows}"
