"""Rows of different lengths in one batch, padded on either side, equal each row alone."""

from __future__ import annotations

import pytest
import torch
from torch_models import NAMES, PAD, TOLERANCE, error, ours, random_ids

LENGTHS = (130, 65, 90, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_equals_its_rows_alone(name: str, attention: str, side: str) -> None:
    model = ours(name, attention=attention, local_rope_theta=10000.0)
    ids = random_ids(max(LENGTHS), rows=len(LENGTHS))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    ids = ids.masked_fill(mask == 0, PAD)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, output_hidden_states=True)
        for row, is_token in enumerate(mask.bool()):
            alone = model(ids[row, is_token][None], output_hidden_states=True)
            for states, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert error(states[row, is_token], expected[0]) < TOLERANCE
            if name == "ForCausalLM":
                assert error(together.logits[row, is_token], alone.logits[0]) < TOLERANCE
            elif name == "ForSequenceClassification":
                assert error(together.logits[row], alone.logits[0]) < TOLERANCE
