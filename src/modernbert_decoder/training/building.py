"""The model that a recipe trains, with its first weights.

Knows recipes and the PyTorch classes, and nothing of training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from modernbert_decoder.architecture import RELEASED_SIZES, ReleasedSize
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from modernbert_decoder.training.errors import RecipeError, TrainingError
from modernbert_decoder.training.recipe import ModelRecipe, Recipe
from modernbert_decoder.training.tokenizer_training import TrainingTokenizer
from modernbert_decoder.training.trainer import set_output_dropout

_ROUND_TO = 64


def build_model(recipe: Recipe, tokenizer: TrainingTokenizer) -> ModernBertDecoderForCausalLM:
    """The model in float32: initialized from the recipe's seed, or with the weights of its checkpoint.

    Raises:
        RecipeError: tokenizer and model do not fit.
    """
    if recipe.model.checkpoint is not None:
        model = _continued(recipe, recipe.model.checkpoint)
        _check_tokenizer(model.config, tokenizer, recipe.model.checkpoint)
    else:
        torch.manual_seed(recipe.run.seed)
        model = ModernBertDecoderForCausalLM(new_configuration(recipe, tokenizer))
    model.set_attn_implementation(recipe.run.attention)
    set_output_dropout(model, recipe.model.attention_output_dropout)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def new_configuration(recipe: Recipe, tokenizer: TrainingTokenizer) -> ModernBertDecoderConfig:
    """The configuration of a model that starts from scratch.

    Raises:
        RecipeError: the embedding has fewer rows than the tokenizer has ids.
    """
    shape = shape_of(recipe.model)
    stated = recipe.model.vocab_size
    vocab_size = -(-tokenizer.vocab_size // _ROUND_TO) * _ROUND_TO if stated is None else stated
    if vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; raise it, "
            "or leave it out"
        )
    base = recipe.phases[0].rope_base
    if base is None:
        raise RecipeError("phases[0].rope_base: null is for a checkpoint, which has its own; state it")
    return ModernBertDecoderConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=recipe.max_position_embeddings,
        global_attn_every_n_layers=recipe.model.full_attention_every,
        local_attention=2 * recipe.model.window,
        global_rope_theta=base,
        local_rope_theta=base,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def shape_of(recipe: ModelRecipe) -> ReleasedSize:
    """Layers, widths and heads of a model that starts from scratch."""
    if recipe.size is not None:
        return RELEASED_SIZES[recipe.size]
    sizes = [getattr(recipe, name) for name in ReleasedSize._fields]
    return ReleasedSize(*sizes)


def load_weights(model: ModernBertDecoderForCausalLM, checkpoint: Path) -> None:
    """Load the weights of a run's checkpoint, sharded or not, into a model that is not sharded.

    Raises:
        TrainingError: they do not fit, which only happens to damaged ones.
    """
    path = checkpoint / "model.safetensors"
    state = load_file(path) if path.is_file() else sharded_weights(checkpoint)
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name != "decoder.weight"]
    if missing or result.unexpected_keys:
        raise TrainingError(
            f"{checkpoint} is damaged: missing {missing}, unexpected {result.unexpected_keys}; remove it to "
            "go on from the one before"
        )


def sharded_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that several processes wrote, whole.

    Raises:
        TrainingError: it holds none.
    """
    from tempfile import TemporaryDirectory

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = checkpoint / "pytorch_model_fsdp_0"
    if not folder.is_dir():
        raise TrainingError(f"{checkpoint} holds no weights; remove it to go on from the one before")
    with TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        state: dict[str, Tensor] = torch.load(whole, weights_only=True)["model"]
    return state


def _continued(recipe: Recipe, checkpoint: str) -> ModernBertDecoderForCausalLM:
    folder = find_checkpoint(checkpoint)
    model: ModernBertDecoderForCausalLM = ModernBertDecoderForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    config = model.config
    config.max_position_embeddings = max(config.max_position_embeddings, recipe.max_position_embeddings)
    return model


def _check_tokenizer(config: ModernBertDecoderConfig, tokenizer: TrainingTokenizer, checkpoint: str) -> None:
    stated = (config.cls_token_id, config.sep_token_id)
    own = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    if stated != own or tokenizer.vocab_size > config.vocab_size:
        raise RecipeError(
            f"tokenizer.source has [CLS] {own[0]}, [SEP] {own[1]} and {tokenizer.vocab_size} ids, but "
            f"model.checkpoint {checkpoint} has {stated[0]}, {stated[1]} and {config.vocab_size}; take the "
            "tokenizer of the checkpoint"
        )
