"""StableAdamW as the recipe has it: fully decoupled weight decay, none on norms and biases.

The optimizer is torch-optimi's. This module decides which parameters decay, and knows nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from modernbert_decoder.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What the optimizer needs to know.

    Attributes:
        learning_rate: the peak, to which schedules are relative and from which the decay is decoupled.
        weight_decay: the fraction that a step at the peak rate takes off a weight. AdamW's form would
            multiply it by the learning rate.
        betas: of the two moving averages.
        eps: added to the denominator.
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, matrices and vectors, of which only the first decays.

    Norm weights and all biases are vectors, and nothing else is. A tied matrix is in the group once. Both
    groups carry the `names` of their parameters.
    """
    matrices: dict[str, nn.Parameter] = {}
    vectors: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors)[name] = parameter
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [
        {"params": list(group.values()), "names": list(group), "weight_decay": decay}
        for group, decay in groups
        if group
    ]


def stable_adamw(
    groups: Iterable[dict[str, Any]], settings: OptimizerSettings, *, is_fused: bool = False
) -> Optimizer:
    """torch-optimi's StableAdamW, whose update clipping stands in for the clipping of gradients.

    Args:
        groups: see `parameter_groups`.
        settings: the recipe's.
        is_fused: let the library choose its fused kernels, which need whole tensors on one device.

    Raises:
        InputError: torch-optimi is not installed.
    """
    try:
        from optimi import StableAdamW
    except ImportError as error:
        raise InputError(
            'training needs torch-optimi; install it with `pip install "modernbert-decoder[train]"`'
        ) from error
    choice: dict[str, Any] = {} if is_fused else {"foreach": False, "triton": False}
    optimizer: Optimizer = StableAdamW(
        [{key: value for key, value in group.items() if key != "names"} for group in groups],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decouple_lr=True,
        max_lr=settings.learning_rate,
        **choice,
    )
    return optimizer
