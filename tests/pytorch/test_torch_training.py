"""Gradient checkpointing: what it computes again, and that gradients stay the same, also under adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_models import NAMES, TOLERANCE, gradients, ours, padded_batch, random_ids, worst

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def loss_of(name: str, model: Any) -> Tensor:
    batch = padded_batch(130, "right")
    labels = batch.pop("labels")
    if name == "Model":
        loss: Tensor = model(**batch).last_hidden_state[batch["attention_mask"].bool()].square().mean()
    elif name == "ForCausalLM":
        loss = model(**batch, labels=labels).loss
    else:
        loss = model(**batch, labels=torch.tensor([1, 0])).loss
    return loss


@contextmanager
def runs_counted(model: Any) -> Iterator[list[int]]:
    """Every run of one layer's feed-forward network, which the second time may stop before its end."""
    runs: list[int] = []
    handle = model.base_model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    yield runs
    handle.remove()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_computes_each_layer_again_and_the_same_gradients(
    name: str, use_reentrant: bool
) -> None:
    model = ours(name, attention="sdpa").train()
    with runs_counted(model) as runs:
        plain = gradients(model, loss_of(name, model))
        assert len(runs) == 1
    assert plain.keys() == dict(model.named_parameters()).keys()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with runs_counted(model) as runs:
        loss = loss_of(name, model)
        assert len(runs) == 1
        again = gradients(model, loss)
        assert len(runs) == 2
    assert worst(again, plain) < TOLERANCE
    model.gradient_checkpointing_disable()
    with runs_counted(model) as runs:
        gradients(model, loss_of(name, model))
        assert len(runs) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip_logits", [False, True])
def test_adapters_on_a_frozen_model_learn_through_checkpoints(skip_logits: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "Wi"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0
    )
    model = peft.get_peft_model(ours(attention="sdpa"), config).train()
    ids = random_ids(130)

    def step() -> dict[str, Tensor]:
        return gradients(model, model(input_ids=ids, labels=ids, skip_logits=skip_logits).loss)

    plain = step()
    assert all("lora_" in name for name in plain)
    assert len(plain) == 2 * 2 * 4  # two matrices for each of two projections in each of four layers
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with runs_counted(model.base_model.model) as runs:
        assert worst(step(), plain) < TOLERANCE
    assert len(runs) == 2
    model.disable_input_require_grads()
