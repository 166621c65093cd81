"""Attention by plain matrix products in bfloat16, for training on a CPU that multiplies in it.

There PyTorch's own backward pass of `scaled_dot_product_attention` takes two to four times as long as the
products it consists of. Responsible for when that is so, and for both forms of attention that training needs;
must not know where masks come from.

Shapes: B batch, T query tokens, S key tokens, H heads, D head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_CHUNK: Final = 128  # queries of one product in causal attention: half of the square is hardly ever computed


def is_faster(q: Tensor, *, dropout: float) -> bool:
    """Whether products beat the fused kernel: for gradients in bfloat16, on CPUs with instructions for it."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or dropout or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():  # which take no function of this kind
        return False
    return q.requires_grad and torch.is_grad_enabled() and _has_bfloat16_products()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scaling: float) -> Tensor:
    """Attention with numbers added to the scores; weights are kept for the backward pass.

    Args:
        q: queries (B, H, T, D).
        k: keys (B, H, S, D).
        v: values (B, H, S, D).
        mask: (B, 1, T, S), of the queries' type or a wider one.
        scaling: factor on the scores.

    Returns:
        (B, H, T, D).
    """
    mixed: Tensor = _Masked.apply(q, k, v, mask, scaling)  # type: ignore[no-untyped-call]
    return mixed


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float) -> Tensor:
    """Attention of each token to itself and those before; weights are computed again in the backward pass.

    Takes queries, keys and values (B, H, T, D) and returns (B, H, T, D).
    """
    mixed: Tensor = _Causal.apply(q, k, v, scaling)  # type: ignore[no-untyped-call]
    return mixed


class _Masked(torch.autograd.Function):
    """`masked_attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        q = q * scaling
        # A padded token that sees nothing would become NaN; so it sees all keys alike, and nobody reads it.
        mask = mask.clamp(min=torch.finfo(q.dtype).min)
        weights = (q @ k.transpose(-1, -2)).add_(mask).softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return weights @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_scores = _grad_of_scores(grad, v, weights)
        return (
            (of_scores @ k).mul_(ctx.scaling),
            of_scores.transpose(-1, -2) @ q,
            weights.transpose(-1, -2) @ grad,
            None,
            None,
        )


class _Causal(torch.autograd.Function):
    """`causal_attention`, a chunk of queries at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        q = q * scaling
        mixed = torch.empty_like(q)
        for start in range(0, q.shape[2], _CHUNK):
            end = min(start + _CHUNK, q.shape[2])
            mixed[:, :, start:end] = _causal_weights(q, k, start, end) @ v[:, :, :end]
        ctx.save_for_backward(q, k, v)
        ctx.scaling = scaling
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # Many chunks add to one key: in bfloat16 the small ones among the later would be lost.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for start in range(0, q.shape[2], _CHUNK):
            end = min(start + _CHUNK, q.shape[2])
            of_mixed = grad[:, :, start:end]
            weights = _causal_weights(q, k, start, end)
            of_scores = _grad_of_scores(of_mixed, v[:, :, :end], weights)
            grad_q[:, :, start:end] = of_scores @ k[:, :, :end]
            grad_k[:, :, :end] += of_scores.transpose(-1, -2) @ q[:, :, start:end]
            grad_v[:, :, :end] += weights.transpose(-1, -2) @ of_mixed
        return grad_q.mul_(ctx.scaling), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _causal_weights(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Of queries `start` to `end` on the keys before `end`: (B, H, end - start, end)."""
    scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
    size = end - start
    later = torch.full((size, size), -torch.inf, dtype=scores.dtype).triu_(1)
    scores[..., start:] += later
    return scores.softmax(dim=-1)


def _grad_of_scores(grad: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """From the gradient of the mixed values (B, H, T, D) to that of the scaled scores (B, H, T, S)."""
    of_weights = grad @ v.transpose(-1, -2)
    of_scores: Tensor = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return of_scores


@cache
def _has_bfloat16_products() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
