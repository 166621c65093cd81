"""Perplexity of the bundled model by block size, on the held-out books that benchmarks/quality.py reads.

The bundled model is 256 wide, but its feed-forward output has 384 columns, which cannot be cut into blocks of
256 and fall back to 128. So that longer blocks are tried in earnest, some schemes pad every row of the layers
to whole blocks, which the package does not do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.experiments.graphs import Shipped, ZeroPoints, build
from benchmarks.experiments.models import Model
from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.quantization import MatrixFormat, QuantizationScheme

_POSITIONS = 512


class WholeBlocks(MatrixFormat):
    """A format whose rows are padded to whole blocks, however long."""

    def fitted(self, columns: int) -> MatrixFormat:
        return self


@dataclass(frozen=True)
class Candidate:
    """A scheme to be scored."""

    name: str
    body: MatrixFormat
    vocabulary: MatrixFormat
    graph: type[Shipped] = Shipped


@dataclass(frozen=True)
class BlockQuality:
    """A scheme's perplexity; `cost` is relative to float32 (0.01 is 1 % more)."""

    name: str
    bits_per_weight: float
    perplexity: float
    cost: float


_FLOAT = MatrixFormat(32)
_INT8 = MatrixFormat(8, 256)
CANDIDATES = (
    Candidate("float32", _FLOAT, _FLOAT),
    *(
        Candidate(f"int8, blocks of {size}", MatrixFormat(8, size), MatrixFormat(8, size))
        for size in (32, 64, 128)
    ),
    Candidate("int8, blocks of 256 (shipped)", _INT8, _INT8),
    *(
        Candidate(f"int8, layers in whole blocks of {size}", WholeBlocks(8, size), _INT8)
        for size in (128, 256)
    ),
    *(Candidate(f"int4 layers, blocks of {size}", MatrixFormat(4, size), _INT8) for size in (32, 64)),
    Candidate("int4 layers, blocks of 128 (shipped)", MatrixFormat(4, 128), _INT8),
    *(Candidate(f"int4 layers, whole blocks of {size}", WholeBlocks(4, size), _INT8) for size in (128, 256)),
    Candidate("int4 layers, blocks of 64, zero points", MatrixFormat(4, 64), _INT8, ZeroPoints),
    *(
        Candidate(
            f"int4 layers, int4 vocabulary in blocks of {size}", MatrixFormat(4, 128), MatrixFormat(4, size)
        )
        for size in (32, 64)
    ),
)


def bundled_model(*, threads: int) -> Model:
    """The bundled model's tensors."""
    checkpoint = Checkpoint.open(find_checkpoint(BUNDLED_MODEL))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.architecture.tensor_shapes()}
    return Model(checkpoint.architecture, tensors, num_positions=_POSITIONS, threads=threads)


def mean_loss(candidate: Candidate, model: Model, windows: Sequence[Sequence[int]], *, threads: int) -> float:
    """Mean negative log-likelihood, in nats, of every token of the windows but their first."""
    scheme = QuantizationScheme(candidate.body, candidate.vocabulary)
    graph, weights = build(
        candidate.graph,
        model.architecture,
        scheme,
        model.weights(scheme),
        model.tensor,
        num_positions=_POSITIONS,
    )
    runtime = Runtime(
        model.architecture,
        graph,
        weights,
        num_slots=1,
        context_length=_POSITIONS,
        threads=threads,
        providers=("CPUExecutionProvider",),
    )
    total, count = 0.0, 0
    for window in windows:
        slot = runtime.cache.allocate()
        logits = runtime.step([Row(slot, window, num_logits=len(window))])[0][:-1]
        runtime.cache.free(slot)
        chosen = logits[np.arange(len(logits)), window[1:]]
        peaks = logits.max(1)
        total += float((np.log(np.exp(logits - peaks[:, None]).sum(1)) + peaks - chosen).sum())
        count += len(chosen)
    runtime.close()
    return total / count


def quality_of(candidate: Candidate, loss: float, float_loss: float) -> BlockQuality:
    """The table's entry; bits are those of the layers' matrices.

    >>> quality_of(CANDIDATES[0], 1.0, 1.0)
    BlockQuality(name='float32', bits_per_weight=32.0, perplexity=2.718281828459045, cost=0.0)
    """
    bits = 8 * candidate.body.bytes_per_weight
    return BlockQuality(candidate.name, bits, math.exp(loss), math.exp(loss - float_loss) - 1)
