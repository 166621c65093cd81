"""Keys and values of texts that are only read: one pool for each layer, cut anew for every batch.

Such texts need no slot. A batch of B rows takes the first B * P positions of a full layer's pool, P being its
longest text, so that many short texts and a few long ones fit the same memory; pages are taken as tokens are
written. This module knows nothing of sessions or jobs.

Legend: B rows, P capacity of a full layer in a batch, R of a sliding layer's ring, H heads, D head width.
"""

from __future__ import annotations

from modernbert_decoder.architecture import DecoderArchitecture, LayerKind
from modernbert_decoder.engine.kv_cache import Float32, Layers, SlotBuffer
from modernbert_decoder.engine.rings import ring_capacity, ring_length


class ReadingCache:
    """Pools of `num_positions` per full layer and of `max_rows` rings per sliding one.

    Attributes:
        peak_positions: most positions of a full layer that were ever in use.

    Raises:
        InputError: the system does not give that much memory.
    """

    def __init__(self, architecture: DecoderArchitecture, *, num_positions: int, max_rows: int) -> None:
        self.num_positions = num_positions
        self.max_rows = max_rows
        self.peak_positions = 0
        self._architecture = architecture
        self._ring_capacity = ring_capacity(architecture)
        values_per_position = architecture.num_attention_heads * architecture.head_dim
        sizes = {
            LayerKind.FULL: num_positions * values_per_position,
            LayerKind.SLIDING: max_rows * self._ring_capacity * values_per_position,
        }
        total_bytes = 2 * 4 * sum(sizes[kind] for kind in architecture.layer_kinds)
        self._pools = [
            [SlotBuffer((1, sizes[kind]), slot_bytes=total_bytes).array[0] for _ in ("key", "value")]
            for kind in architecture.layer_kinds
        ]

    def layers(self, num_rows: int, capacity: int) -> Layers:
        """Keys and values (B, H, P or R, D) for a batch; what they hold is left over from earlier ones."""
        assert num_rows <= self.max_rows, (num_rows, self.max_rows)
        assert num_rows * capacity <= self.num_positions, (num_rows, capacity, self.num_positions)
        self.peak_positions = max(self.peak_positions, num_rows * capacity)
        heads, width = self._architecture.num_attention_heads, self._architecture.head_dim
        layers: list[tuple[Float32, Float32]] = []
        for kind, (keys, values) in zip(self._architecture.layer_kinds, self._pools, strict=True):
            places = self._ring_capacity if kind is LayerKind.SLIDING else capacity
            shape = (num_rows, heads, places, width)
            size = num_rows * heads * places * width
            layers.append((keys[:size].reshape(shape), values[:size].reshape(shape)))
        return layers

    def copy_row(self, source: Layers, row: int, length: int, target: Layers, rows: slice) -> None:
        """Copies the `length` tokens that a row of `source` holds into some rows of `target`."""
        in_ring = ring_length(length, self._ring_capacity, self._architecture.window)
        for kind, sources, targets in zip(self._architecture.layer_kinds, source, target, strict=True):
            places = in_ring if kind is LayerKind.SLIDING else length
            for held, copied in zip(sources, targets, strict=True):
                copied[rows, :, :places] = held[row, :, :places]
