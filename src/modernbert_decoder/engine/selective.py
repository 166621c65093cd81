"""One call of a selective graph: which tokens of a piece are asked for, and what they may see.

Texts that are only classified or embedded ask for few of their tokens, and a selective graph computes its
last layer for those alone. This module turns a piece into that graph's further inputs and keeps the last
layer's keys and values, which such a graph does not write by itself; it knows nothing of sessions.

Legend: B rows, S new tokens per row (right-padded), Q selected per row, T past positions, H heads, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, Head, LayerKind
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.quantization import QuantizationScheme

Int64 = NDArray[np.int64]


def is_worthwhile(architecture: DecoderArchitecture) -> bool:
    """Whether a selective graph reads the texts: nothing is generated, and the last layer is full."""
    is_full = architecture.layer_kinds[-1] is LayerKind.FULL
    return architecture.head is not Head.CAUSAL_LM and is_full


class Selection:
    """The tokens of a piece that are asked for.

    Args:
        wanted: indices into the B * S tokens, in any order.
        shape: (B, S).
        num_past: (B,) tokens of each row so far.
        num_positions: of the rotary tables; padding behind the last of them gets its place.

    Attributes:
        selected: (B, Q) indices into the B * S tokens; a row that asks for fewer repeats its first token.
        found: where the wanted tokens are among the B * Q, in the order in which they were asked for.
        positions: (B, S) places of the new tokens in their texts.
        selected_positions: (B, Q) those of the selected ones.
        num_past: T, the past positions that have to be there: 0 if nothing is asked for.
    """

    def __init__(
        self, wanted: Sequence[int], shape: tuple[int, int], num_past: Int64, *, num_positions: int
    ) -> None:
        num_rows, longest = shape
        tokens = np.asarray(wanted, np.int64)
        rows = tokens // longest
        counts = np.bincount(rows, minlength=num_rows)
        order = np.argsort(rows, kind="stable")
        # The place of each among those of its row.
        starts = np.cumsum(counts) - counts
        places = np.arange(len(tokens)) - starts[rows[order]]
        self.selected = np.repeat(np.arange(num_rows)[:, None] * longest, max(counts, default=0), axis=1)
        self.selected[rows[order], places] = tokens[order]
        self.found = np.empty(len(tokens), np.int64)
        self.found[order] = rows[order] * self.selected.shape[1] + places
        self.positions = np.minimum(num_past[:, None] + np.arange(longest), num_positions - 1)
        self._places = self.selected % longest
        self.selected_positions = num_past[:, None] + self._places
        self.num_past = int(num_past.max()) if len(tokens) else 0
        self._past_lengths = num_past

    def visible(self) -> Float32:
        """(B, 1, Q, T + S): 0 where a selected token sees a key, minus infinity elsewhere."""
        num_rows, num_selected = self.selected.shape
        longest = self.positions.shape[1]
        past = np.arange(self.num_past) < self._past_lengths[:, None]
        new = np.arange(longest) <= self._places[..., None]
        past = np.broadcast_to(past[:, None], (num_rows, num_selected, self.num_past))
        is_seen = np.concatenate([past, new], axis=2)
        return np.where(is_seen, np.float32(0), np.float32(-np.inf))[:, None]

    def is_token(self, lengths: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(B, S, 1): whether there is a token, in rows of so many (B,)."""
        return (np.arange(self.positions.shape[1]) < lengths[:, None])[..., None]


def divided_projection(
    weights: Mapping[str, NDArray[Any]], architecture: DecoderArchitecture, scheme: QuantizationScheme
) -> dict[str, NDArray[Any]]:
    """The weights with the last layer's `Wqkv` in two: few tokens meet `Wq`, all of them `Wkv`."""
    whole = f"model.layers.{architecture.num_hidden_layers - 1}.attn.Wqkv."
    is_transposed = scheme.body.is_per_row  # and then the scales are not
    divided: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        if not name.startswith(whole):
            divided[name] = array
            continue
        axis = 1 if is_transposed and name.endswith(".data") else 0
        query, rest = np.split(array, [array.shape[axis] // 3], axis=axis)
        part = name.removeprefix(whole)
        for key, values in (("Wq", query), ("Wkv", rest)):
            divided[f"{whole.removesuffix('Wqkv.')}{key}.{part}"] = np.ascontiguousarray(values)
    return divided


class ScratchPair:
    """Memory for two arrays, used again from call to call: new memory takes longer to get than to fill."""

    def __init__(self) -> None:
        self._flat = np.empty((2, 0), np.float32)

    def pair(self, shape: tuple[int, ...]) -> tuple[Float32, Float32]:
        """Two arrays of that shape, over the memory of those before."""
        size = math.prod(shape)
        if self._flat.shape[1] < size:
            self._flat = np.empty((2, size), np.float32)
        first, second = self._flat[:, :size].reshape(2, *shape)
        return first, second


def past_of(layer: tuple[Float32, Float32], count: int) -> tuple[Float32, Float32]:
    """Copies of the first `count` positions of a layer's keys and values (B, H, P, D)."""
    keys, values = layer
    return np.ascontiguousarray(keys[:, :, :count]), np.ascontiguousarray(values[:, :, :count])


def append(layer: tuple[Float32, Float32], new: tuple[Float32, Float32], num_past: Int64) -> None:
    """Writes new keys and values (B, H, S, D) behind each row's past ones; what has no room is padding."""
    for held, added in zip(layer, new, strict=True):
        for row, start in enumerate(num_past):
            room = held[row, :, start : start + added.shape[2]]
            room[:] = added[row, :, : room.shape[1]]
