"""Losses in float32, averaged over the items that a training step really has.

Responsible for the loss of either head, and for the language-model losses that are computed together with
their gradients, chunk by chunk. Must not know models or configurations.

Shapes: B batch, T tokens, N tokens of all rows, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_decoder.errors import InputError

IGNORED: Final = -100
"""The label of tokens and rows that do not count."""

# Logits that exist at one time in the fused loss: big enough for efficient matrix products, small enough that
# they, and not the whole batch's, set the peak. 333 tokens of a vocabulary of 50,368.
_CHUNK_BYTES: Final = 1 << 26
_MIN_CHUNK_TOKENS: Final = 64
_SOFTMAX_ROWS: Final = 16  # 3 MB of such logits

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

NumItems = int | Tensor | None
"""Items to average over; None: those of this batch. A trainer that accumulates gradients passes the sum over
all batches of a step, so that every item weighs the same."""


def next_token_labels(labels: Tensor) -> Tensor:
    """Labels (B, T) moved so that position t holds the token that follows it; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).long()


def causal_lm_loss(logits: Tensor, targets: Tensor, *, num_items: NumItems = None) -> Tensor:
    """Cross-entropy of logits (..., V) against the tokens that follow (...), in float32."""
    flat = targets.flatten().to(logits.device)
    total = F.cross_entropy(_widened(logits).flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
    return total / _denominator(num_items, flat)


def fused_causal_lm_loss(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transform: Callable[[Tensor], Tensor],
    num_items: NumItems = None,
) -> Tensor:
    """`causal_lm_loss` of `transform(hidden) @ weight.T + bias`, holding a chunk of the logits at a time.

    Tokens without a label are dropped before the transformation. Gradients are exact: they are computed
    together with the loss, while a chunk's logits exist.

    Args:
        hidden: (B, T, C).
        targets: (B, T), the token that follows each position.
        weight: (V, C).
        bias: (V,), or None.
        transform: what comes before the projection.
        num_items: see `NumItems`.
    """
    flat_hidden, flat = hidden.flatten(0, 1), targets.flatten().to(hidden.device)
    denominator = _denominator(num_items, flat)
    if not torch.compiler.is_compiling():  # a data-dependent shape
        counted = (flat != IGNORED).nonzero().squeeze(1)
        flat_hidden, flat = flat_hidden.index_select(0, counted), flat.index_select(0, counted)
    transformed = transform(flat_hidden)
    if not torch.is_grad_enabled():  # a parameter would still ask for its gradient
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        transformed, weight, bias, flat
    )
    return total / denominator


def causal_lm_loss_and_logits(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transform: Callable[[Tensor], Tensor],
    num_items: NumItems = None,
) -> tuple[Tensor, Tensor]:
    """`causal_lm_loss` of the logits, and the logits (B, T, V), for float32 outside of autocast.

    The logits are the only thing of their size: log-probabilities and their gradient exist a chunk at a time,
    and only for tokens with a label. Gradients reach `hidden` and `weight` through both results, but have no
    gradients of their own. Arguments as in `fused_causal_lm_loss`.
    """
    flat = targets.flatten().to(hidden.device)
    transformed = transform(hidden)  # (B, T, C)
    total, logits = _LinearAndCrossEntropy.apply(  # type: ignore[no-untyped-call]
        transformed.flatten(0, 1), weight, bias, flat
    )
    return total / _denominator(num_items, flat), logits.unflatten(0, targets.shape)


def classification_loss(
    logits: Tensor, labels: Tensor, *, problem_type: ProblemType, num_items: NumItems = None
) -> Tensor:
    """The loss of a classifier's logits (B, labels), in float32.

    Regression takes the mean squared error, one label the cross-entropy, several labels the binary
    cross-entropy of each.

    Raises:
        InputError: a `ValueError`: labels of another shape.
    """
    logits, labels = _widened(logits), labels.to(logits.device)
    if problem_type == "single_label_classification":
        flat = labels.flatten().long()
        if flat.shape[0] != logits.shape[0]:
            raise InputError(
                f"labels have the shape {tuple(labels.shape)}, but {logits.shape[0]} rows have one class "
                "each. For several labels at once pass floating point numbers, or state problem_type."
            )
        total = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        return total / _denominator(num_items, flat)
    if labels.shape != logits.shape and (logits.shape[1] != 1 or labels.shape != logits.shape[:1]):
        raise InputError(
            f"labels have the shape {tuple(labels.shape)}, but {problem_type} needs one number per label and "
            f"row: {tuple(logits.shape)}."
        )
    expected = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        total = F.mse_loss(logits, expected, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(logits, expected, reduction="sum")
    return total / (expected.numel() if num_items is None else num_items)


def problem_type_of(labels: Tensor, num_labels: int) -> ProblemType:
    """The documented rule where a configuration states none."""
    if num_labels == 1:
        return "regression"
    is_index = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if is_index else "multi_label_classification"


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of `hidden @ weight.T + bias`, (N, C) and (V, C)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wants[2] else None
        project = _Projection(weight, bias, wide)
        for rows in _chunks(hidden.shape[0], size=project.chunk_tokens):
            logits = project(hidden[rows])
            total += _replace_by_gradient(logits, targets[rows])
            if not any(wants):
                continue
            gradient = logits.to(project.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ weight
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[rows])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


class _LinearAndCrossEntropy(torch.autograd.Function):
    """`_LinearCrossEntropy` in float32 together with the logits (N, V)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:3]
        logits = F.linear(hidden, weight, bias)
        total = logits.new_zeros(())
        grad_hidden = torch.zeros_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight) if wants[1] else None
        grad_bias = logits.new_zeros(weight.shape[0]) if wants[2] else None
        counted = (targets != IGNORED).nonzero().squeeze(1)
        size = _chunk_tokens(weight.shape[0])
        buffer = logits.new_empty(min(size, counted.shape[0]), weight.shape[0])
        for rows in _chunks(counted.shape[0], size=size):
            chunk = counted[rows]
            gradient = torch.index_select(logits, 0, chunk, out=buffer[: chunk.shape[0]])
            total += _replace_by_gradient(gradient, targets[chunk])
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, chunk, gradient @ weight)
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), hidden[chunk])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)  # nobody asks for the gradient of all logits, as a rule
        return total, logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        of_total = [
            None if gradient is None or grad_total is None else gradient * grad_total
            for gradient in ctx.gradients
        ]
        if grad_logits is None:
            return (*of_total, None)
        wants = ctx.needs_input_grad
        of_logits = (
            grad_logits @ weight if wants[0] else None,
            grad_logits.t() @ hidden if wants[1] else None,
            grad_logits.sum(0) if wants[2] else None,
        )
        return (*(_sum(*pair) for pair in zip(of_total, of_logits, strict=True)), None)


class _Projection:
    """`x @ weight.T + bias` for one chunk of tokens after the other, in a type at least float32.

    In float32 every chunk's logits take the same memory: fresh memory of this size comes from the operating
    system page by page, which costs about as much as a pass over it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> None:
        self.weight, self.bias, self.wide = weight, bias, wide
        self.chunk_tokens = _chunk_tokens(weight.shape[0])
        self.dtype = wide  # of the products: what the plain projection would yield
        self._buffer: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C) to logits (n, V), which the next call overwrites."""
        is_lower = torch.is_autocast_enabled(x.device.type) or x.dtype != self.wide
        if is_lower or torch.compiler.is_compiling():
            logits = F.linear(x, self.weight, self.bias)
            self.dtype = logits.dtype
            return logits.to(self.wide)
        if self._buffer is None:
            self._buffer = x.new_empty(x.shape[0], self.weight.shape[0])  # no later chunk is longer
        logits = self._buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=logits)
        return torch.addmm(self.bias, x, self.weight.t(), out=logits)


def _replace_by_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of logits (n, V) and targets (n,); the logits become its gradient.

    That is the probabilities, minus 1 at the target, and zeros for tokens that do not count. On the CPU a few
    rows at a time, so that all passes but the first find them in the processor's cache.
    """
    is_counted = (targets != IGNORED)[:, None]
    columns = targets[:, None].masked_fill(~is_counted, 0)
    is_whole = logits.device.type != "cpu" or torch.compiler.is_compiling()
    total = logits.new_zeros(())
    for rows in _chunks(logits.shape[0], size=logits.shape[0] if is_whole else _SOFTMAX_ROWS):
        block, weights = logits[rows], is_counted[rows].to(logits.dtype)
        block -= block.amax(dim=-1, keepdim=True)
        picked = block.gather(1, columns[rows])
        sums = block.exp_().sum(dim=-1, keepdim=True)
        block *= weights / sums
        block.scatter_add_(1, columns[rows], -weights)
        total += ((sums.log() - picked) * weights).sum()
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left.T @ right`, in place where all three have one type."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _chunk_tokens(vocab_size: int) -> int:
    return max(_MIN_CHUNK_TOKENS, _CHUNK_BYTES // (4 * vocab_size))


def _chunks(num_tokens: int, *, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _denominator(num_items: NumItems, targets: Tensor) -> int | Tensor:
    if num_items is None:
        return (targets != IGNORED).sum()
    return num_items.to(targets.device) if isinstance(num_items, Tensor) else num_items
