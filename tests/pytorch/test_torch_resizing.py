"""Another vocabulary, and the tie between embedding and projection: kept, cut and joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_models import NAMES, TOLERANCE, error, gradients, main_output, ours, random_ids, worst

OLD, NEW = 96, 110

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's advice on mean_resizing


def is_tied(model: Any) -> bool:
    return model.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("new", [NEW, 96])
@pytest.mark.parametrize("name", NAMES)
def test_a_larger_or_smaller_vocabulary_survives_saving(tmp_path: Path, name: str, new: int) -> None:
    model, ids = ours(name, vocab_size=OLD if new > OLD else NEW), random_ids(70)
    old = model.config.vocab_size
    before = main_output(model(ids))
    model.resize_token_embeddings(new)
    assert model.config.vocab_size == new
    assert model.get_input_embeddings().weight.shape == (new, 32)
    after = main_output(model(ids))
    if name == "ForCausalLM":
        common = min(old, new)
        assert after.shape[-1] == new
        assert error(after[..., :common], before[..., :common]) < TOLERANCE
    else:
        assert error(after, before) < TOLERANCE
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vocab_size == new
    ids[0, -10:] = new - 1
    assert error(main_output(loaded(ids)), main_output(model(ids))) < TOLERANCE


@pytest.mark.parametrize("new", [NEW, 96])
@pytest.mark.parametrize("is_untied", [False, True])
def test_projection_and_bias_have_the_size_of_the_vocabulary(new: int, is_untied: bool) -> None:
    model = ours(vocab_size=OLD if new > OLD else NEW, tie_word_embeddings=not is_untied)
    weight, bias = model.decoder.weight.detach().clone(), model.decoder.bias.detach().clone()
    model.resize_token_embeddings(new)
    common = min(new, len(bias))
    assert is_tied(model) is not is_untied
    assert model.decoder.weight.shape == (new, 32)
    assert model.decoder.out_features == new
    assert model.decoder.bias.shape == (new,)
    assert torch.equal(model.decoder.weight[:common], weight[:common])
    assert torch.equal(model.decoder.bias[:common], bias[:common])
    assert model(random_ids(70)).logits.shape[-1] == new
    if new > common:  # of new tokens: zero, or the mean of the old ones, and never what memory held
        added = model.decoder.bias[common:]
        assert bias.min() < added.min() <= added.max() < bias.max()


@pytest.mark.parametrize("is_untied", [False, True])
def test_training_goes_on_with_new_tokens(is_untied: bool) -> None:
    model = ours(attention="sdpa", tie_word_embeddings=not is_untied).train()
    model.resize_token_embeddings(NEW)
    ids = random_ids(80)
    ids[:, ::9] = NEW - 1
    plain = gradients(model, model(ids, labels=ids).loss)
    fused = gradients(model, model(ids, labels=ids, skip_logits=True).loss)
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert worst(fused, plain) < TOLERANCE
    assert fused["decoder.bias"][NEW - 1] != 0
    assert fused["model.embeddings.tok_embeddings.weight"][NEW - 1].any()


def test_an_untied_checkpoint_loaded_tied_has_one_matrix(tmp_path: Path) -> None:
    model, ids = ours(tie_word_embeddings=False), random_ids(70)
    model.save_pretrained(tmp_path / "untied")
    tied = type(model).from_pretrained(tmp_path / "untied", tie_word_embeddings=True)
    assert is_tied(tied)
    assert tied.config.tie_word_embeddings is True
    assert torch.equal(tied.get_input_embeddings().weight, model.get_input_embeddings().weight)
    tied.save_pretrained(tmp_path / "tied")
    again, info = type(model).from_pretrained(tmp_path / "tied", output_loading_info=True)
    assert is_tied(again)
    assert not info["missing_keys"]
    assert error(again(ids).logits, tied(ids).logits) < TOLERANCE
    assert not is_tied(type(model).from_pretrained(tmp_path / "untied"))
