"""Loading and saving: files shared with upstream's classes, no memory before the weights, new weights."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_models import NAMES, TOLERANCE, error, main_output, ours, random_ids, upstream

import modernbert_decoder.pytorch as wing
from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM, ModernBertDecoderModel
from test_checkpoint_spellings import ARCHITECTURE, CONFIGURATIONS

KINDS = ("full_attention", "sliding_attention")
BASES = {"global_rope_theta": 80000.0, "local_rope_theta": 80000.0}


def bases(config: Any) -> tuple[float, float]:
    """Of full and of sliding layers, as upstream's configuration of either generation states them."""
    if getattr(config, "rope_parameters", None):
        full, sliding = (config.rope_parameters[kind]["rope_theta"] for kind in KINDS)
        return full, sliding
    return config.global_rope_theta, config.local_rope_theta


@pytest.mark.parametrize("name", NAMES)
def test_upstream_reads_our_files_and_we_read_upstreams(tmp_path: Path, name: str) -> None:
    mine = ours(name, local_attention=20, num_labels=3, **BASES)
    mine.save_pretrained(tmp_path / "ours")
    theirs = getattr(upstream, f"ModernBertDecoder{name}").from_pretrained(tmp_path / "ours").eval()
    assert theirs.config.sliding_window == 10
    assert bases(theirs.config) == (80000.0, 80000.0)
    theirs.save_pretrained(tmp_path / "theirs")
    back, info = getattr(wing, f"ModernBertDecoder{name}").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (back.config.sliding_window, back.config.num_labels) == (10, 3)
    assert (back.config.global_rope_theta, back.config.local_rope_theta) == (80000.0, 80000.0)
    ids = random_ids(130)
    with torch.no_grad():
        expected = main_output(mine(ids))
        assert error(main_output(theirs(ids)), expected) < TOLERANCE
        assert error(main_output(back.eval()(ids)), expected) < TOLERANCE
        wide, moved = ours(name, num_labels=3, **BASES), ours(name, local_attention=20, num_labels=3)
        for other in (wide, moved):  # the window and the bases can be told by these numbers
            assert error(main_output(other(ids)), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_saving_two_bases_warns_about_readers_that_know_one(tmp_path: Path, name: str) -> None:
    model = ours(name, global_rope_theta=80000.0, local_rope_theta=10000.0)
    with pytest.warns(UserWarning, match="transformers 4 will use the RoPE base"):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.config.global_rope_theta, loaded.config.local_rope_theta) == (80000.0, 10000.0)
    ids = random_ids(130)
    assert error(main_output(loaded(ids)), main_output(model(ids))) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours(name, **BASES).save_pretrained(tmp_path / "equal")


@pytest.mark.parametrize("spelling", list(CONFIGURATIONS))
def test_every_spelling_of_a_configuration_gives_the_same_model(tmp_path: Path, spelling: str) -> None:
    folder = write_checkpoint(tmp_path, ARCHITECTURE)
    expected = ModernBertDecoderForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGURATIONS[spelling]), encoding="utf-8")
    loaded = ModernBertDecoderForCausalLM.from_pretrained(folder)
    assert loaded.config.to_architecture() == expected.config.to_architecture()
    ids = random_ids(130)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tiny_architecture())


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Where the parameters of bare models are when these are built, before anything is loaded."""
    seen: set[str] = set()
    original = ModernBertDecoderModel.post_init

    def record(model: Any) -> None:
        original(model)
        seen.update(parameter.device.type for parameter in model.parameters())

    monkeypatch.setattr(ModernBertDecoderModel, "post_init", record)
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_takes_no_memory_before_its_weights_are_read(
    folder: Path, devices: set[str], name: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("accelerate")
    model_class = getattr(wing, f"ModernBertDecoder{name}")
    loaded = model_class.from_pretrained(folder, **options)
    assert devices == {"meta"}
    plain, ids = model_class(loaded.config), random_ids(70)
    assert devices == {"meta", "cpu"}
    plain.load_state_dict(loaded.state_dict())
    assert error(main_output(loaded(ids)), main_output(plain.eval()(ids))) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_what_does_not_fit_is_offloaded_a_whole_layer_at_a_time(
    folder: Path, tmp_path: Path, share: float
) -> None:
    pytest.importorskip("accelerate")
    load = ModernBertDecoderForCausalLM.from_pretrained
    plain, ids = load(folder), random_ids(70)
    memory = {"cpu": int(share * sum(p.nbytes for p in plain.parameters()))}
    spread = load(folder, device_map="auto", max_memory=memory, offload_folder=str(tmp_path / "offloaded"))
    places = spread.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    inside = [place for place in places if place.startswith("model.layers.")]
    assert all(place.count(".") == 2 for place in inside), places
    assert {places[place] for place in inside} == {"cpu", "disk"}, places
    with torch.no_grad():
        assert error(spread(ids).logits, plain(ids).logits) < TOLERANCE


def shrinkage(limit: float) -> float:
    """Of the standard deviation of a normal distribution that is cut off so many deviations away."""
    density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * limit * density / math.erf(limit / math.sqrt(2)))


def assert_drawn(weight: Tensor, std: float, *, limit: float = 2.0) -> None:
    """A sample of the truncated normal distribution: within five standard errors, and cut off there."""
    values = weight.detach()
    assert values.abs().max() <= limit * std * 1.0001
    assert values.abs().max() > 0.9 * limit * std
    assert abs(values.std() / (std * shrinkage(limit)) - 1) < 5 / math.sqrt(2 * values.numel())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_weights_that_a_checkpoint_lacks_are_drawn_as_in_a_new_model(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = ours(num_hidden_layers=3, classifier_bias=True)
    model.save_pretrained(tmp_path / "lm")
    residual = 0.02 / math.sqrt(2 * 3)
    load = wing.ModernBertDecoderForSequenceClassification.from_pretrained
    classifier, info = load(tmp_path / "lm", num_labels=64, output_loading_info=True, **options)
    new = {"head.dense.weight", "head.dense.bias", "head.norm.weight", "classifier.weight", "classifier.bias"}
    assert set(info["missing_keys"]) == new
    assert_drawn(classifier.head.dense.weight, residual)
    assert_drawn(classifier.classifier.weight, 32**-0.5)
    assert bool((classifier.head.norm.weight == 1).all())
    assert not classifier.head.dense.bias.any()
    assert not classifier.classifier.bias.any()
    loaded = classifier.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.model.state_dict().items())

    model.model.save_pretrained(tmp_path / "bare")
    headed = wing.ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "bare", **options)
    assert_drawn(headed.lm_head.dense.weight, residual)
    assert bool((headed.lm_head.norm.weight == 1).all())
    assert not headed.decoder.bias.any()
    assert headed.decoder.weight is headed.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore")
def test_another_number_of_labels_replaces_the_projection_only(tmp_path: Path) -> None:
    model = ours("ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path, num_labels=64)
    loaded = type(model).from_pretrained(tmp_path, num_labels=64, ignore_mismatched_sizes=True)
    assert (loaded.num_labels, loaded.config.num_labels, len(loaded.config.id2label)) == (64, 64, 64)
    assert_drawn(loaded.classifier.weight, 32**-0.5)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["classifier.weight"]
