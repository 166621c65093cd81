"""`generate` for prompts of several lengths, padded on the left: each row is what its prompt gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_models import PAD, ours, random_ids

PROMPTS = (50, 31)  # tokens
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def generated(model: Any, ids: Tensor, *, new: int, **options: Any) -> Tensor:
    """The new tokens alone."""
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
    tokens: Tensor = model.generate(ids, attention_mask=(ids != PAD).long(), **fixed, **options)
    return tokens[:, ids.shape[1] :]


@pytest.mark.filterwarnings("ignore::UserWarning")  # a warning of the library's about running uncompiled
@pytest.mark.parametrize(
    ("attention", "new", "options"),
    [
        ("eager", 60, {}),
        ("eager", 60, STATIC),
        ("sdpa", 60, {}),
        ("sdpa", 60, STATIC),
        ("sdpa", 40, {"num_beams": 3}),
        ("eager", 40, {"num_beams": 3, **STATIC}),
        ("flex_attention", 20, {}),
        ("flex_attention", 20, STATIC),
    ],
)
def test_each_row_of_a_ragged_batch_gets_the_tokens_of_its_prompt_alone(
    attention: str, new: int, options: dict[str, Any]
) -> None:
    model, alone = (ours(attention=each, local_rope_theta=10000.0) for each in (attention, "sdpa"))
    prompts = [random_ids(length, rows=1) for length in PROMPTS]
    batch = torch.full((2, max(PROMPTS)), PAD)
    for row, prompt in enumerate(prompts):
        batch[row, -prompt.shape[1] :] = prompt[0]
    with torch.compiler.set_stance("force_eager"):  # FlexAttention would be compiled anew for every token
        tokens = generated(model, batch, new=new, **options)
    beams = {"num_beams": options["num_beams"]} if "num_beams" in options else {}
    expected = torch.cat([generated(alone, prompt, new=new, **beams) for prompt in prompts])
    assert torch.equal(tokens, expected)
    assert len(tokens.unique()) > 5  # not one token again and again, which would hide much
