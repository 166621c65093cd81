"""The classifier: float32 losses, regression like upstream's, and which token is pooled in every case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_models import PAD, TOLERANCE, error, gradients, ours, padded_batch, pair, random_ids, worst
from transformers import DynamicCache

KINDS = ("full_attention", "sliding_attention")


def logits_at(model: Any, ids: Tensor, column: int, **inputs: Any) -> Tensor:
    """What the classifier says of one position (row 0), from the states of the bare model."""
    state = model.model(ids, **inputs).last_hidden_state[0, column]
    return model.classifier(model.head(state))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        ("regression", torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]])),
    ],
)
def test_the_loss_of_a_bfloat16_classifier_is_computed_in_float32(problem_type: str, labels: Tensor) -> None:
    model = ours("ForSequenceClassification", num_labels=3, problem_type=problem_type).to(torch.bfloat16)
    output = model(random_ids(70), labels=labels)
    assert output.logits.dtype == torch.bfloat16
    functions: dict[str, Any] = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }
    loss = functions[problem_type]
    assert output.loss.dtype == torch.float32
    assert error(output.loss, loss(output.logits.float(), labels)) < TOLERANCE
    in_bfloat16 = loss(output.logits, labels if labels.ndim == 1 else labels.bfloat16())
    assert error(in_bfloat16.float(), output.loss) > TOLERANCE  # the two can be told apart


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_regression_with_one_label_equals_upstream(side: str) -> None:
    mine, theirs = pair("ForSequenceClassification", num_labels=1)
    assert mine.config.problem_type is None
    batch = {**padded_batch(130, side), "labels": torch.tensor([0.5, -2.0])}
    a, b = mine(**batch), theirs(**batch)
    assert mine.config.problem_type == theirs.config.problem_type == "regression"
    assert error(a.logits, b.logits) < TOLERANCE
    assert error(a.loss, b.loss) < TOLERANCE
    mine_gradients = gradients(mine, a.loss)
    assert mine_gradients.keys() == dict(mine.named_parameters()).keys()
    assert worst(mine_gradients, gradients(theirs, b.loss)) < TOLERANCE


def test_the_mask_decides_what_is_pooled_and_without_one_the_id_of_padding() -> None:
    model, ids = ours("ForSequenceClassification"), random_ids(70)
    ids[0, -1] = PAD  # a token like any other, says the mask
    ones = torch.ones_like(ids)
    by_mask, by_id = (model(ids, attention_mask=mask).logits[0] for mask in (ones, None))
    assert error(by_mask, logits_at(model, ids, -1)) < TOLERANCE
    assert error(by_id, logits_at(model, ids, -2)) < TOLERANCE
    assert error(by_id, by_mask) > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["one for all layers", "one per kind"])
def test_beside_a_mask_of_four_dimensions_the_id_of_padding_decides(form: str, attention: str) -> None:
    model, ids = ours("ForSequenceClassification", attention=attention), random_ids(60)
    ids[0, -5:] = PAD
    causal = torch.ones(60, 60, dtype=torch.bool).tril()[None, None]
    if attention == "eager":
        causal = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    mask: Any = causal if form == "one for all layers" else dict.fromkeys(KINDS, causal)
    logits = model(ids, attention_mask=mask).logits
    assert error(logits[0], logits_at(model, ids, -6)) < TOLERANCE
    assert error(logits[1], model(ids[1:]).logits[0]) < TOLERANCE


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_classifier_continues_from_a_cache(attention: str, side: str) -> None:
    model, batch = ours("ForSequenceClassification", attention=attention), padded_batch(130, side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for start, stop in ((0, 90), (90, 91), (91, 130)):  # the padding on the right is in the last chunk
            chunk = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            output = model(ids[:, start:stop], **chunk)
    assert output.past_key_values is cache
    assert error(output.logits, whole) < TOLERANCE
