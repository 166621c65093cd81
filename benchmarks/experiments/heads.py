"""Graphs whose two ends differ from the shipped one: the embedding, the vocabulary product, what is put out.

Beside graphs.py, which alters the layers. It knows nothing of sessions or of time.

Legend: M logit rows, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from benchmarks.experiments.graphs import Shipped, Tensor, Weights
from modernbert_decoder.costs import EMBEDDING

NUM_CANDIDATES = 64
_VOCABULARY_PARTS = 2
_TRANSPOSED = ".transposed"


class _OtherOutputs(Shipped):
    """A head that puts out something else than all logits."""

    def put_out(self, name: str, element_type: int, shape: Sequence[str | int]) -> None:
        self.outputs.insert(0, helper.make_tensor_value_info(name, element_type, shape))

    def head(self, x: str) -> None:
        super().head(x)
        self.outputs = [each for each in self.outputs if each.name != "logits"]
        self.reduce()

    def reduce(self) -> None:
        """Appends what is put out instead."""
        raise NotImplementedError


class GreedyInGraph(_OtherOutputs):
    """The best token (M,), chosen by ArgMax."""

    def reduce(self) -> None:
        self.op("ArgMax", ["logits"], output="token", axis=-1, keepdims=0)
        self.put_out("token", TensorProto.INT64, ["M"])


class GreedyByTopK(_OtherOutputs):
    """The best token (M, 1), chosen by TopK."""

    def reduce(self) -> None:
        one = self.constant("one", [1])
        self.multi_op("TopK", ["logits", one], outputs=["value", "token"], axis=-1)
        self.put_out("token", TensorProto.INT64, ["M", 1])


class CandidatesInGraph(_OtherOutputs):
    """The `NUM_CANDIDATES` most likely tokens, and the log of the sum of exponentials."""

    def reduce(self) -> None:
        count = self.constant("num_candidates", [NUM_CANDIDATES])
        self.multi_op("TopK", ["logits", count], outputs=["values", "ids"], axis=-1)
        self.op("ReduceLogSumExp", ["logits", self.constant("last", [-1])], output="log_sum")
        self.put_out("log_sum", TensorProto.FLOAT, ["M", 1])
        self.put_out("ids", TensorProto.INT64, ["M", NUM_CANDIDATES])
        self.put_out("values", TensorProto.FLOAT, ["M", NUM_CANDIDATES])


class LogSumInGraph(Shipped):
    """All logits, and the log of the sum of their exponentials from the maximum and that sum."""

    def head(self, x: str) -> None:
        super().head(x)
        last = self.constant("last", [-1])
        peak = self.op("ReduceMax", ["logits", last])
        exponentials = self.op("Exp", [self.op("Sub", ["logits", peak])])
        log = self.op("Log", [self.op("ReduceSum", [exponentials, last])])
        self.op("Add", [log, peak], output="log_sum")
        self.outputs.insert(0, helper.make_tensor_value_info("log_sum", TensorProto.FLOAT, ["M", 1]))


class FloatEmbedding(Shipped):
    """Embedding rows from a float32 table of their own instead of the vocabulary matrix's bytes."""

    def embeddings(self) -> str:
        x = self.op("Gather", [self.external(EMBEDDING, self.shapes[EMBEDDING]), "input_ids"])
        return self.norm("model.embeddings.norm", x)

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        return {**shipped, EMBEDDING: tensor(EMBEDDING)}


class VocabularyInParts(Shipped):
    """The vocabulary matrix as two products of half as many rows, joined."""

    def linear(self, name: str, x: str, *, weight: str | None = None, output: str | None = None) -> str:
        if name != "decoder":
            return super().linear(name, x, weight=weight, output=output)
        parts = []
        for part, (start, end) in self._ends().items():
            self.shapes[f"{part}.weight"] = (end - start, self.architecture.hidden_size)
            self.shapes[f"{part}.bias"] = (end - start,)
            parts.append(super().linear(part, x))
        return self.op("Concat", parts, output=output, axis=-1)

    def _ends(self) -> dict[str, tuple[int, int]]:
        size = self.architecture.vocab_size // _VOCABULARY_PARTS
        # The builder gives these names the layers' format: that is the vocabulary's only in int8.
        return {f"decoder.part{i}": (i * size, (i + 1) * size) for i in range(_VOCABULARY_PARTS)}

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        ends = self._ends()
        return {
            **shipped,
            **self.parts(shipped, EMBEDDING, {f"{part}.weight": rows for part, rows in ends.items()}),
            **{f"{part}.bias": shipped["decoder.bias"][start:end] for part, (start, end) in ends.items()},
        }


class TransposedFloat(Shipped):
    """float32 matrices stored (K, N) for MatMul, which packs them, instead of FusedMatMul with (N, K)."""

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind == "FusedMatMul":
            weight = inputs[1]
            rows, columns = self.shapes[weight]
            if weight != EMBEDDING:  # which the lookup of rows needs as it is
                del self.initializers[weight]
            kind, domain, attributes = "MatMul", "", {}
            inputs = [inputs[0], self.external(f"{weight}{_TRANSPOSED}", (columns, rows))]
        super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        found = dict(shipped)
        for name in self.initializers:
            if name.endswith(_TRANSPOSED):
                found[name] = np.ascontiguousarray(tensor(name.removesuffix(_TRANSPOSED)).T)
        return found
