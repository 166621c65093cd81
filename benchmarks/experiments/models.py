"""Random models in memory, of the released shapes, in any block format, without files or caches.

One `Model` holds the float32 tensors of a size and packs them once per matrix format; experiments of that
size share it. It knows nothing of sessions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_models import random_tensors
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import EMBEDDING
from modernbert_decoder.engine.weights import EMBEDDING_ROWS, rotary_tables
from modernbert_decoder.quantization import (
    MatrixFormat,
    PackedMatrix,
    QuantizationScheme,
    fused_shapes,
    fused_tensor,
    quantize,
)


class Model:
    """Tensors by checkpoint name, and their packed forms."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        tensors: dict[str, NDArray[np.float32]],
        *,
        num_positions: int,
        threads: int,
    ) -> None:
        self.architecture = architecture
        self.num_positions = num_positions
        self._tensors = tensors
        self._threads = threads
        self._packed: dict[tuple[str, MatrixFormat], PackedMatrix] = {}

    @classmethod
    def random(cls, architecture: DecoderArchitecture, *, num_positions: int, threads: int) -> Model:
        """A model of that shape."""
        tensors = random_tensors(architecture)
        return cls(architecture, tensors, num_positions=num_positions, threads=threads)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor by its name in the graph: query, key and value are joined."""
        return fused_tensor(name, self._tensors.__getitem__)

    def weights(self, scheme: QuantizationScheme) -> dict[str, NDArray[Any]]:
        """The initializers of the shipped graph in this scheme."""
        found: dict[str, NDArray[Any]] = dict(rotary_tables(self.architecture, self.num_positions))
        for name, shape in fused_shapes(self.architecture).items():
            matrix = scheme.format_of(name)
            if len(shape) == 1 or matrix.bits == 32:
                found[name] = self.tensor(name)
            else:
                found |= self._pack(name, matrix.fitted(shape[1])).tensors(name)
        if f"{EMBEDDING}.data" in found:
            data = found[f"{EMBEDDING}.data"]
            found[EMBEDDING_ROWS] = data.reshape(len(data), -1)
        return found

    def _pack(self, name: str, matrix: MatrixFormat) -> PackedMatrix:
        key = (name, matrix)
        if key not in self._packed:
            self._packed[key] = quantize(self.tensor(name), matrix, name=name, threads=self._threads)
        return self._packed[key]
