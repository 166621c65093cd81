"""What a finished phase leaves behind: a model folder with tokenizer, recipe, curve, evaluation and card.

Knows how a model is written and measured, and nothing of how it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from modernbert_decoder.atomic_files import write_folder
from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from modernbert_decoder.training.curve import curve_table, draw_curve
from modernbert_decoder.training.held_out import HeldOutTexts
from modernbert_decoder.training.model_card import CardFacts, Evaluation, model_card
from modernbert_decoder.training.recipe import Recipe

_EVALUATION_FILE: Final = "evaluation.json"
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def write_model_folder(
    destination: Path,
    *,
    recipe: Recipe,
    config: ModernBertDecoderConfig,
    state: Mapping[str, Tensor],
    held_out: HeldOutTexts | None,
    history: Sequence[Mapping[str, float]],
    num_phases: int,
    tokens: int,
    epochs: int,
    write_extras: Callable[[Path], None],
) -> list[Evaluation]:
    """Write a model in Hugging Face format with everything that belongs beside it.

    Args:
        destination: the folder, replaced if it is there.
        recipe: of the run.
        config: of the model as it is now.
        state: its weights, whole.
        held_out: texts to measure it on.
        history: the log so far.
        num_phases: finished ones.
        tokens: trained on.
        epochs: passes over the data.
        write_extras: adds the tokenizer and the recipe.

    Returns:
        The bits per byte in float32 and, if that is another, in the format of the weights.
    """
    model = _whole_model(config, state)
    dtype = recipe.model.saved_dtype
    evaluations = _evaluations(model, held_out, dtype, tokens_at_once=recipe.run.micro_batch_tokens)
    model.to(_DTYPES[dtype])  # type: ignore[arg-type]

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        write_extras(folder)
        (folder / "curve.csv").write_text(curve_table(history), encoding="utf-8")
        has_curve = draw_curve(history, folder / "curve.png", title=recipe.name)
        facts = CardFacts(
            architecture=config.to_architecture(),
            num_phases=num_phases,
            tokens=tokens,
            epochs=epochs,
            evaluations=evaluations,
            num_bytes=0 if held_out is None else held_out.num_bytes,
            has_curve=has_curve,
            folder=f"./{destination.name}",
        )
        (folder / "README.md").write_text(model_card(recipe, facts), encoding="utf-8")
        results = [asdict(entry) for entry in evaluations]
        (folder / _EVALUATION_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    write_folder(destination, write, overwrite=True)
    return evaluations


def stored_evaluations(folder: Path) -> list[Evaluation]:
    """What was measured when a model folder was written; nothing where no text was held out."""
    path = folder / _EVALUATION_FILE
    if not path.is_file():
        return []
    return [Evaluation(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _whole_model(
    config: ModernBertDecoderConfig, state: Mapping[str, Tensor]
) -> ModernBertDecoderForCausalLM:
    """A model of its own, outside of everything that trains."""
    own = ModernBertDecoderConfig.from_dict(config.to_dict(), use_cache=True)
    with torch.random.fork_rng():  # first weights that nobody will see must not shift the run's dropout
        model = ModernBertDecoderForCausalLM(own)
    result = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"decoder.weight"}
    return model


def _evaluations(
    model: ModernBertDecoderForCausalLM, held_out: HeldOutTexts | None, dtype: str, *, tokens_at_once: int
) -> list[Evaluation]:
    if held_out is None:
        return []
    results = [("float32", held_out.measure(model, tokens_at_once=tokens_at_once))]
    if dtype != "float32":
        model.to(_DTYPES[dtype]).float()  # type: ignore[arg-type]
        results.append((dtype, held_out.measure(model, tokens_at_once=tokens_at_once)))
    return [Evaluation(name, result.bits_per_byte, result.perplexity) for name, result in results]
