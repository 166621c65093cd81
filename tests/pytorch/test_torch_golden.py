"""Equal to numbers of transformers 4.57.6, kept in tests/golden with the script that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_models import LENGTHS, SIDES, TOLERANCE, error, gradients, worst

import modernbert_decoder.pytorch as wing

FILE = Path(__file__).resolve().parent.parent / "golden" / "transformers_4_57.npz"
STRIDE = 7  # as in the script


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Any]:
    with np.load(FILE) as arrays:
        return {name: arrays[name] for name in arrays.files}


def of_prefix(golden: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): torch.tensor(value)
        for name, value in golden.items()
        if name.startswith(f"{prefix}/")
    }


def model(golden: Mapping[str, Any], name: str, prefix: str, attention: str, **changes: Any) -> Any:
    config = wing.ModernBertDecoderConfig(**json.loads(str(golden["config"])), **changes)
    built = getattr(wing, f"ModernBertDecoder{name}")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        weights = of_prefix(golden, f"{prefix}/weights")
        parameters = dict(built.named_parameters())
        assert parameters.keys() == weights.keys()
        for key, value in weights.items():
            parameters[key].copy_(value)
    return built.eval()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_language_model_equals_the_golden_values(
    golden: Mapping[str, Any], attention: str, length: int, side: str
) -> None:
    mine = model(golden, "ForCausalLM", "causal_lm", attention)
    expected = of_prefix(golden, f"causal_lm/{length}/{side}")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "labels")}
    output = mine(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
    is_token = inputs["attention_mask"].bool()[:, ::STRIDE]
    assert error(output.logits[:, ::STRIDE][is_token], expected["logits"][is_token]) < TOLERANCE
    states = torch.stack(output.hidden_states)[:, :, ::STRIDE]
    assert error(states[:, is_token], expected["hidden_states"][:, is_token]) < TOLERANCE
    if attention == "eager" or side != "left":  # in left padding SDPA's empty rows are zeros, not means
        assert error(output.loss, expected["loss"]) < TOLERANCE
    if attention == "eager" and "attentions" in expected:
        weights = torch.stack(output.attentions)[:, :, :, ::STRIDE, ::STRIDE]
        assert error(weights, expected["attentions"]) < TOLERANCE
        theirs = of_prefix(golden, f"causal_lm/{length}/{side}/gradients")
        assert worst(gradients(mine, output.loss), theirs) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "problem_type", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_classifier_equals_the_golden_values(golden: Mapping[str, Any], problem_type: str, side: str) -> None:
    mine = model(golden, "ForSequenceClassification", "classifier", "sdpa", problem_type=problem_type)
    expected = of_prefix(golden, f"classifier/{problem_type}/{side}")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "labels")}
    output = mine(**inputs)
    assert error(output.logits, expected["logits"]) < TOLERANCE
    assert error(output.loss, expected["loss"]) < TOLERANCE
