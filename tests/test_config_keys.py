"""Keys of a config.json that we do not use: harmless values pass in silence, others are errors.

The exception are the encoder's own keys, of which upstream's decoder classes are shown here to read none.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from checkpoints import tiny_architecture
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.config_keys import INERT_KEYS, INERT_VALUES
from modernbert_decoder.errors import ConfigurationError

CONFIG = tiny_architecture().to_config(warn=False)
# Some value of every type that JSON has: whatever a key's harmless values are, some of these are others.
VALUES: tuple[Any, ...] = (True, False, 0.5, 7, "other", {"a": 1}, [1])
# What no released encoder says.
UNUSUAL_VALUES: dict[str, Any] = {
    "classifier_pooling": "mean",
    "deterministic_flash_attn": True,
    "reference_compile": True,
    "repad_logits_with_grad": True,
    "sparse_pred_ignore_index": 7,
    "sparse_prediction": True,
}


def read(**changes: Any) -> DecoderArchitecture:
    """What our reader makes of it, which must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DecoderArchitecture.from_config({**CONFIG, **changes})


@pytest.mark.parametrize("key", INERT_VALUES)
def test_a_key_that_could_change_numbers_passes_at_its_harmless_values_only(key: str) -> None:
    for value in INERT_VALUES[key]:
        assert read(**{key: value}) == read()
    refused = [value for value in VALUES if value not in INERT_VALUES[key]]
    assert len(refused) >= len(VALUES) - 1
    for value in refused:
        with pytest.raises(ConfigurationError, match=key):
            read(**{key: value})


@pytest.mark.parametrize("key", sorted(INERT_KEYS))
@pytest.mark.parametrize("value", [None, *VALUES], ids=str)
def test_a_key_of_the_encoder_alone_passes_at_any_value(key: str, value: Any) -> None:
    assert read(**{key: value}) == read()


@pytest.mark.parametrize(
    "name", ["ModernBertDecoderForCausalLM", "ModernBertDecoderForSequenceClassification"]
)
def test_upstream_decoders_compute_the_same_whatever_the_encoders_keys_say(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert UNUSUAL_VALUES.keys() == INERT_KEYS

    def outputs(**changes: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        stated = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
        config = transformers.ModernBertDecoderConfig(**{**stated, "num_labels": 3, **changes})
        model = getattr(transformers, name)(config).eval()
        ids = torch.arange(12).reshape(2, 6)
        labels = ids if name.endswith("CausalLM") else torch.tensor([0, 2])
        with torch.no_grad():
            output = model(ids, labels=labels)
        return output.logits, output.loss

    for usual, unusual in zip(outputs(), outputs(**UNUSUAL_VALUES), strict=True):
        assert torch.equal(usual, unusual)
