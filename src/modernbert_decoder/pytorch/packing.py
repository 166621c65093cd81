"""A padded batch as one row of its tokens, so that padding costs nothing where nobody will see it.

Decides from masks and labels alone whether that gives the same loss. Must not know the network.

Shapes: B batch, T tokens with padding, N tokens without, in the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are.

    Attributes:
        indices: (N,), of the tokens among the B * T slots.
        position_ids: (1, N), the column of each: where they do not go up by one, the next row begins.
    """

    indices: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, targets: Tensor, *, ignored: int) -> Packing | None:
        """The packing of a batch, both (B, T); None where it would change the loss or save nothing.

        It would where padding has targets, where a row has padding between its tokens (a sliding window
        counts that), and where a row begins in the column after the end of the row before.

        >>> import torch
        >>> Packing.of(torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.full((2, 3), -100), ignored=-100)
        Packing(indices=tensor([0, 1, 2, 4, 5]), position_ids=tensor([[0, 1, 2, 1, 2]]))
        """
        if attention_mask.shape != targets.shape:
            return None
        is_token = attention_mask.to(targets.device) != 0
        counts = is_token.sum(dim=1)
        begins = is_token[:, 1:] & ~is_token[:, :-1]
        num_runs = begins.sum(dim=1) + is_token[:, 0]
        first = is_token.int().argmax(dim=1)
        follows = first[1:] == (first + counts)[:-1]
        has_target = (targets != ignored) & ~is_token
        if not bool((num_runs == 1).all() & ~follows.any() & ~has_target.any() & ~is_token.all()):
            return None
        indices = is_token.flatten().nonzero().squeeze(1)
        return cls(indices, (indices % is_token.shape[1])[None])

    def select(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.indices.to(x.device))[None]
