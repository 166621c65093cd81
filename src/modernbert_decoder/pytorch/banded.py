"""Sliding-window attention over whole sequences in time proportional to T times the window, not T squared.

Queries are cut into blocks of at least the window's width; what a block sees lies in its own and the previous
block of keys. `scaled_dot_product_attention` then runs on every block as if it were a row of the batch. Must
not know the network; `masks.py` decides when a band is used.

Shapes: B batch, T tokens, H heads, D head width, N blocks of b tokens: T <= N * b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_decoder.pytorch.products import is_faster, masked_attention

_MIN_BLOCK: Final = 32  # narrower blocks cost more in overhead than they save in products
_MIN_BLOCKS: Final = 4  # with fewer, a band is hardly narrower than the whole


@dataclass(frozen=True)
class Band:
    """Which keys each query of a sliding layer sees, block by block.

    Attributes:
        visible: (B or 1, N, b, 2 * b), True where the query sees the key; key column c of block n is slot
            (n - 1) * b + c.

    >>> Band.of(8, window=2, padding=None, starts=None, device=torch.device("cpu"), block=4).visible[0].int()
    tensor([[[0, 0, 0, 0, 1, 0, 0, 0],
             [0, 0, 0, 0, 1, 1, 0, 0],
             [0, 0, 0, 0, 0, 1, 1, 0],
             [0, 0, 0, 0, 0, 0, 1, 1]],
    <BLANKLINE>
            [[0, 0, 0, 1, 1, 0, 0, 0],
             [0, 0, 0, 0, 1, 1, 0, 0],
             [0, 0, 0, 0, 0, 1, 1, 0],
             [0, 0, 0, 0, 0, 0, 1, 1]]], dtype=torch.int32)
    """

    visible: Tensor

    @staticmethod
    def is_worth_it(num_tokens: int, *, window: int) -> bool:
        """Whether a sequence is long enough, compared with the window, for a band to pay."""
        return num_tokens >= _MIN_BLOCKS * _block(window)

    @classmethod
    def of(
        cls,
        num_tokens: int,
        *,
        window: int,
        padding: Tensor | None,
        starts: Tensor | None,
        device: torch.device,
        block: int | None = None,
    ) -> Band:
        """The band of T tokens; `padding` (B, T) is True for tokens, `starts` (B, T) as in `MaskRequest`."""
        b = _block(window) if block is None else block
        num_blocks = -(-num_tokens // b)
        missing = num_blocks * b - num_tokens
        queries = torch.arange(num_blocks * b, device=device).view(1, num_blocks, b, 1)
        keys = queries.view(1, num_blocks, 1, b)
        keys = torch.cat((keys - b, keys), dim=-1)  # (1, N, 1, 2 * b)
        visible = (keys >= 0) & (keys <= queries) & (keys > queries - window)
        if starts is not None:
            visible = visible & (keys >= F.pad(starts, (0, missing)).view(-1, num_blocks, b, 1))
        if padding is not None:
            blocks = F.pad(padding, (b, missing)).view(-1, num_blocks + 1, b)  # an empty block in front
            visible = visible & torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=-1).unsqueeze(2)
        return cls(visible)


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, dropout: float, scaling: float
) -> Tensor:
    """Attention within a band: (B, H, T, D) three times to (B, T, H, D).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: `additive_band` of the band.
        dropout: probability of dropping a weight.
        scaling: factor on the scores.
    """
    batch_size, num_tokens, b = q.shape[0], q.shape[2], mask.shape[-2]
    missing = -num_tokens % b
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    blocks = (_blocks(q, b).flatten(0, 1), _with_previous_block(k, b), _with_previous_block(v, b))
    if is_faster(q, dropout=dropout):
        mixed = masked_attention(*blocks, mask, scaling=scaling)  # (B * N, H, b, D)
    else:
        mixed = F.scaled_dot_product_attention(*blocks, attn_mask=mask, dropout_p=dropout, scale=scaling)
    mixed = mixed.transpose(1, 2).reshape(batch_size, -1, *q.shape[1::2])  # (B, N * b, H, D)
    return mixed[:, :num_tokens]


def additive_band(band: Band, *, batch_size: int, dtype: torch.dtype) -> Tensor:
    """A band as numbers to add to the scores: (B * N, 1, b, 2 * b), every block a row of the batch."""
    zero = torch.zeros((), dtype=dtype, device=band.visible.device)
    numbers = torch.where(band.visible, zero, -torch.inf)
    return numbers.expand(batch_size, -1, -1, -1).flatten(0, 1).unsqueeze(1)


def _blocks(x: Tensor, b: int) -> Tensor:
    """(B, H, N * b, D) to (B, N, H, b, D), without copying."""
    return x.view(*x.shape[:2], -1, b, x.shape[-1]).transpose(1, 2)


def _with_previous_block(x: Tensor, b: int) -> Tensor:
    """(B, H, N * b, D) to (B * N, H, 2 * b, D): each block behind its predecessor, zeros before the first."""
    previous = F.pad(x[:, :, :-b], (0, 0, b, 0))
    return torch.cat((_blocks(previous, b), _blocks(x, b)), dim=3).flatten(0, 1)


def _block(window: int) -> int:
    return max(window, _MIN_BLOCK)
