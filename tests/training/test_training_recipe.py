"""Recipes: what the ready ones say, and what is refused, by file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_recipes import PUBLISHED, B
from tiny_runs import phase, recipe_table

from modernbert_decoder.costs import RELEASED_SIZES
from modernbert_decoder.errors import InputError, ModelNotFoundError
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe, ready_names, recipe_text
from modernbert_decoder.training.strict_reading import read_section

OTHERS = ("cross", "smoke", "storyteller")


def test_there_is_a_ready_recipe_for_every_released_size() -> None:
    assert ready_names() == sorted([*(f"ettin-{size}" for size in RELEASED_SIZES), *OTHERS])


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_recipe_of_a_released_size_is_the_published_one(size: str) -> None:
    recipe = read_recipe(f"ettin-{size}")
    rate, decay, warmup, batch_warmup = PUBLISHED[size]
    optimizer, first = recipe.optimizer, recipe.phases[0]
    assert (optimizer.learning_rate, optimizer.weight_decay) == (rate, decay)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.98), 1e-6)
    assert (first.warmup_tokens, first.batch_warmup_tokens) == (warmup * B, batch_warmup * B)
    assert [p.tokens for p in recipe.phases] == [1700 * B, 250 * B, 50 * B]
    assert [p.sequence_length for p in recipe.phases] == [1024, 7999, 7999]
    assert [p.rope_base for p in recipe.phases] == [10_000, 160_000, 160_000]
    assert [p.final_rate for p in recipe.phases] == [None, 0.5, 0.02]
    assert [p.decay_tokens for p in recipe.phases] == [0, 250 * B, 50 * B]
    assert {p.batch_sequences for p in recipe.phases} == {4608}
    assert recipe.model.attention_output_dropout == 0.1
    assert (recipe.model.size, recipe.model.window, recipe.max_position_embeddings) == (size, 64, 7999)


@pytest.mark.parametrize("name", ready_names())
def test_a_recipe_written_is_read_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    (tmp_path / "copy.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "copy.yaml") == recipe


@pytest.mark.parametrize("text", ["3e-3", "3.0e-3", "0.003", "'0.003'"])
def test_numbers_that_yaml_takes_for_text_are_numbers(text: str) -> None:
    assert read_recipe("smoke", changes=[f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 0.003


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert read_recipe("smoke", changes=["phases.0.tokens=2e6"]).phases[0].tokens == 2_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phases.0.tokns=3", r"phases\[0\]\.tokns is not a key .* mean tokens"),
        ("colour=red", r"colour is not a key of a recipe\. Keys here: name, model"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast', but must be a number"),
        ("optimizer.learning_rate=.nan", "must be a number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate is 0.0, but must be positive"),
        ("optimizer.betas=[0.9]", "optimizer.betas has 1 entries, but must have 2"),
        ("optimizer.weight_decay=1", "optimizer.weight_decay"),
        ("phases.0.tokens=1.5", r"phases\[0\]\.tokens is 1.5, but must be a whole number"),
        ("phases.0.tokens=true", "must be a whole number"),
        ("phases=[]", "phases is empty"),
        ("model.size=99m", "model"),
        ("model.num_attention_heads=null", "num_attention_heads: missing beside"),
        ("run.precision=float16", "choose one of auto, float32, bfloat16"),
        ("run.report_to=tensorboard", r"run.report_to is 'tensorboard', but must be a list; write \["),
        ("data.form=pckd", "choose one of packed, unpacked"),
        ("data.exclude=[a]", "data.exclude: there are no files"),
        ("data={files: [a], dataset: b}", "data.dataset: states a data set beside files"),
        ("data.dataset_config=x", "there is no dataset"),
        ("tokenizer.source=x", "tokenizer.source: state either"),
        ("tokenizer.train.vocab_size=260", "256 bytes and 5 special tokens need 261"),
        ("phases.0.name=a/b", r"phases\[0\]\.name is 'a/b'"),
        ("phases.1.name=pretrain", "is there twice"),
        ("phases.0.warmup_tokens=500_000", "more than the phase's 400,000 tokens"),
        ("phases.0.batch_warmup_start=null", "batch_warmup_start"),
        ("phases.0.batch_warmup_start=32", "a batch warm-up grows"),
        ("phases.1.final_rate=null", r"phases\[1\]\.final_rate"),
        ("phases.2.final_rate=0.9", "more than 0.5, where the phase before ends"),
        ("phases.1.sequence_length=1", "must be 2 at least"),
        ("model.max_position_embeddings=256", r"phases\[1\]\.sequence_length is 512, longer than"),
        ("run.micro_batch_tokens=400", "less than one sequence"),
        ("run.sequence_multiple=3", r"batch_sequences is 16, no multiple of run.sequence_multiple \(3\)"),
        ("run.seed=-1", "must not be negative"),
        ("evaluation={files: []}", "evaluation.files is empty"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_file_and_key(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe("smoke", changes=[change])
    assert "smoke.yaml: " in str(caught.value)


def test_a_missing_key_is_named() -> None:
    table = recipe_table(["a.txt"], phases=[phase()])
    del table["phases"][0]["tokens"]
    with pytest.raises(RecipeError, match=r"mine.yaml: phases\[0\]\.tokens is missing"):
        read_section(Recipe, table, source="mine.yaml")


def test_unknown_recipes_and_broken_files_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="ready ones are cross, ettin-150m"):
        read_recipe("ettin-2b")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot read"):
        read_recipe(broken)
    broken.write_text("just text", encoding="utf-8")
    with pytest.raises(RecipeError, match="no table of keys"):
        read_recipe(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.seed", "has no `=`"),
        ("phases.7.tokens=1", "not in the recipe"),
        ("phases.9=1", "entries 0 to 2"),
    ],
)
def test_a_change_that_has_no_place_is_refused(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe("smoke", changes=[change])
