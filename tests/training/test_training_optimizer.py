"""StableAdamW as the recipe has it: which parameters decay, and by how much."""

from __future__ import annotations

import pytest
import torch

from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from modernbert_decoder.training.optimizer import OptimizerSettings, parameter_groups, stable_adamw

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=3e-4)


def model(**changes: object) -> ModernBertDecoderForCausalLM:
    config = ModernBertDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=3,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        **changes,  # type: ignore[arg-type]
    )
    return ModernBertDecoderForCausalLM(config)


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    decaying, resting = parameter_groups(model(), weight_decay=3e-4)
    assert decaying["weight_decay"] == 3e-4
    assert resting["weight_decay"] == 0.0
    layer = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.Wo", "mlp.Wi", "mlp.Wo")
    assert set(decaying["names"]) == {
        "model.embeddings.tok_embeddings.weight",
        "lm_head.dense.weight",
        *(f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layer),
    }
    assert set(resting["names"]) == {
        "model.embeddings.norm.weight",
        "model.layers.0.mlp_norm.weight",
        "model.layers.1.attn_norm.weight",
        "model.layers.1.mlp_norm.weight",
        "model.final_norm.weight",
        "lm_head.norm.weight",
        "decoder.bias",
    }


def test_every_parameter_is_in_one_group_also_with_all_biases_and_an_untied_vocabulary() -> None:
    full = model(
        norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, tie_word_embeddings=False
    )
    groups = parameter_groups(full, weight_decay=1e-4)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in full.named_parameters())
    assert not [name for name in groups[0]["names"] if name.endswith(".bias") or "norm" in name]
    assert "decoder.weight" in groups[0]["names"]


def test_frozen_parameters_are_in_no_group() -> None:
    partly = model()
    partly.model.requires_grad_(False)
    names = [name for group in parameter_groups(partly, weight_decay=0.1) for name in group["names"]]
    assert not [name for name in names if name.startswith("model.")]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_decay_takes_its_own_fraction_and_not_that_times_the_learning_rate(fraction: float) -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    module = torch.nn.Module()
    module.matrix, module.vector = matrix, vector
    optimizer = stable_adamw(parameter_groups(module, weight_decay=3e-4), SETTINGS)
    for group in optimizer.param_groups:
        group["lr"] = SETTINGS.learning_rate * fraction
    matrix.grad, vector.grad = torch.zeros(4, 4), torch.zeros(4)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((4, 4), 1 - 3e-4 * fraction), rtol=0, atol=1e-7)
    assert torch.equal(vector, torch.ones(4))


def test_optimizer_has_the_published_settings() -> None:
    optimizer = stable_adamw(parameter_groups(model(), weight_decay=3e-4), SETTINGS)
    assert type(optimizer).__name__ == "StableAdamW"
    for group in optimizer.param_groups:
        assert (group["beta1"], group["beta2"], group["eps"]) == (0.9, 0.98, 1e-6)
        assert group["decouple_lr"]
        assert group["max_lr"] == SETTINGS.learning_rate


def test_updates_are_clipped_where_adamw_would_take_the_full_step() -> None:
    """After quiet steps a gradient a thousand times larger moves a weight by little more than the rate."""
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    module = torch.nn.Module()
    module.weight = weight
    optimizer = stable_adamw(parameter_groups(module, weight_decay=0.0), SETTINGS)
    for _ in range(50):
        weight.grad = torch.full((8, 8), 1e-3)
        optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert (weight - before).abs().max() < 1.1 * SETTINGS.learning_rate
