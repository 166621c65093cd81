"""A tokenizer trained from scratch is one that the package, and transformers, read as they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tiny_runs import tiny_recipe, write_texts

from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.errors import InputError, ModelNotFoundError
from modernbert_decoder.tokenizer import Tokenizer
from modernbert_decoder.training import tokenizer_training
from modernbert_decoder.training.documents import open_source
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.recipe import DataRecipe, TokenizerTraining
from modernbert_decoder.training.tokenizer_training import (
    SPECIAL_TOKENS,
    TrainingTokenizer,
    read_tokenizer,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    files = write_texts(folder / "texts")
    tokenizer = train_tokenizer(
        open_source(tiny_recipe(files).data), TokenizerTraining(vocab_size=300), seed=0
    )
    tokenizer.write(folder, max_length=64)
    return folder


def test_it_has_the_size_asked_for_and_the_special_tokens_first(trained: Path) -> None:
    tokenizer = read_tokenizer(str(trained))
    assert tokenizer.vocab_size == 300
    assert [tokenizer.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_the_package_puts_cls_in_front_and_its_template_ends_with_sep(trained: Path) -> None:
    from dataclasses import replace

    architecture = replace(
        released_architecture("17m"),
        vocab_size=320,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_ids=(2,),
        sep_token_id=2,
        pad_token_id=3,
    )
    tokenizer = Tokenizer.from_folder(trained, architecture)
    text = "the fox and é 漢 \U0001f98a\n\nold hills"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert 2 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_template("a", "b") == [1, *ids_of(tokenizer, "a"), 2, *ids_of(tokenizer, "b"), 2]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[1:]


def test_transformers_reads_the_same_special_tokens(trained: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, theirs.mask_token_id) == (
        1,
        2,
        3,
        4,
    )
    ids = theirs("the fox")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)


def test_training_is_decided_by_the_data_and_the_seed(trained: Path, tmp_path: Path) -> None:
    files = write_texts(tmp_path / "texts")
    again = train_tokenizer(open_source(tiny_recipe(files).data), TokenizerTraining(vocab_size=300), seed=0)
    assert again.tokenizer.to_str() == read_tokenizer(str(trained)).tokenizer.to_str()


def texts_read(files: list[str], *, max_bytes: int) -> list[str]:
    """The documents that a tokenizer is trained on."""
    return list(tokenizer_training._texts(open_source(tiny_recipe(files).data), max_bytes, seed=0))


@pytest.mark.parametrize("num_lines", [1, 255, 256, 257, 512])
def test_it_is_trained_on_every_document_once(num_lines: int, tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(num_lines)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    assert texts_read([str(tmp_path / "a.txt")], max_bytes=10**6) == lines


def test_it_is_trained_on_as_many_bytes_as_asked_for_and_not_on_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(["é" * 10] * 9), encoding="utf-8")  # 20 bytes each
    assert len(texts_read([str(tmp_path / "a.txt")], max_bytes=60)) == 3


def test_half_a_surrogate_pair_in_the_data_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a fox \ud800"}), encoding="utf-8")
    read = texts_read([str(tmp_path / "a.jsonl")], max_bytes=100)
    assert read == ["a fox \ufffd"]


def test_too_little_text_says_how_large_a_vocabulary_it_gives(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab", encoding="utf-8")
    with pytest.raises(InputError, match=r"a vocabulary of 26\d entries only"):
        train_tokenizer(
            open_source(DataRecipe(files=(str(tmp_path),))), TokenizerTraining(vocab_size=900), seed=0
        )


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(RecipeError, match=r"has no \[CLS\], \[SEP\], \[PAD\]"):
        TrainingTokenizer.of(plain, source="here")
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer\.json"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read"):
        read_tokenizer(str(tmp_path))


def test_the_released_tokenizer_is_read(shared: Path) -> None:
    tokenizer = read_tokenizer(str(shared / "data" / "ettin-tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.cls_token_id, tokenizer.sep_token_id) == (50368, 50281, 50282)
    assert tokenizer.pad_token_id == 50283
