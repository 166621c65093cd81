"""Graphs that differ from the shipped one in a single respect, with the weights that they need.

Each class alters one step of the package's own builder, so that everything else stays what is shipped. It
knows nothing of sessions or of time.

Legend: B rows, S new tokens per row, T valid tokens of all rows, M logit rows, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import EMBEDDING
from modernbert_decoder.engine.graph import _GraphBuilder
from modernbert_decoder.quantization import MatrixFormat, QuantizationScheme

Weights = Mapping[str, NDArray[Any]]
Tensor = Callable[[str], NDArray[np.float32]]

_CONTRIB = "com.microsoft"


class Shipped(_GraphBuilder):
    """The graph as the package builds it."""

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        """Initializers of this graph, from those of the shipped one and the float32 tensors by name."""
        return shipped

    def parts(self, shipped: Weights, name: str, ends: Mapping[str, tuple[int, int]]) -> Weights:
        """Rows start:end of a matrix under new names, sharing its memory."""
        found = {}
        for suffix in ("", ".data", ".scales"):
            array = shipped.get(f"{name}{suffix}")
            if array is not None:
                found |= {f"{part}{suffix}": array[start:end] for part, (start, end) in ends.items()}
        return found


# Of each sign; of use to w8a8 only, which is not among the shipped formats here.
_ACTIVATION_LEVELS = 127


def build(
    kind: type[Shipped],
    architecture: DecoderArchitecture,
    scheme: QuantizationScheme,
    shipped: Weights,
    tensor: Tensor,
    *,
    num_positions: int,
) -> tuple[bytes, Weights]:
    """The serialized graph and the weights of one of these classes."""
    builder = kind(architecture, scheme, num_positions, _ACTIVATION_LEVELS)
    builder.build()
    weights = builder.weights(shipped, tensor)
    return builder.serialized(), {name: weights[name] for name in builder.initializers if name in weights}


class SplitAttentionInput(Shipped):
    """Query, key and value as three products."""

    def linear(self, name: str, x: str, *, weight: str | None = None, output: str | None = None) -> str:
        if not name.endswith(".Wqkv"):
            return super().linear(name, x, weight=weight, output=output)
        rows, columns = self.shapes[f"{name}.weight"]
        self._qkv = []
        for part in "qkv":
            self.shapes[f"{name}.{part}.weight"] = (rows // 3, columns)
            self._qkv.append(super().linear(f"{name}.{part}", x))
        return self._qkv[0]

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind == "GroupQueryAttention":
            inputs = [*self._qkv, *inputs[3:]]
        super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        width = self.architecture.hidden_size
        found = dict(shipped)
        for i in range(self.architecture.num_hidden_layers):
            name = f"model.layers.{i}.attn.Wqkv"
            ends = {f"{name}.{part}.weight": (j * width, (j + 1) * width) for j, part in enumerate("qkv")}
            found |= self.parts(shipped, f"{name}.weight", ends)
        return found


class SplitFeedForwardInput(Shipped):
    """The activated half of `Wi` and its gate as two products, without the node that splits one."""

    def linear(self, name: str, x: str, *, weight: str | None = None, output: str | None = None) -> str:
        if not name.endswith(".Wi"):
            return super().linear(name, x, weight=weight, output=output)
        self._wi = name
        return x

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind != "Split":
            super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)
            return
        rows, columns = self.shapes[f"{self._wi}.weight"]
        for part, output in zip(("activated", "gate"), outputs, strict=True):
            self.shapes[f"{self._wi}.{part}.weight"] = (rows // 2, columns)
            super().linear(f"{self._wi}.{part}", inputs[0], output=output)

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        size = self.architecture.intermediate_size
        found = dict(shipped)
        for i in range(self.architecture.num_hidden_layers):
            name = f"model.layers.{i}.mlp.Wi"
            ends = {f"{name}.activated.weight": (0, size), f"{name}.gate.weight": (size, 2 * size)}
            found |= self.parts(shipped, f"{name}.weight", ends)
        return found


class FusedNorms(Shipped):
    """Every residual sum joined with the norm behind it: SkipLayerNormalization."""

    def norm(self, name: str, x: str, *, output: str | None = None) -> str:
        add = self.nodes[-1]
        if add.op_type != "Add" or list(add.output) != [x] or f"{name}.bias" in self.shapes:
            return super().norm(name, x, output=output)
        self.nodes.pop()
        weight = self.external(f"{name}.weight", self.shapes[f"{name}.weight"])
        output = output or f"{name}.output"
        self.multi_op(
            "SkipLayerNormalization",
            [*add.input, weight],
            outputs=[output, "", "", x],
            domain=_CONTRIB,
            epsilon=self.architecture.norm_eps,
        )
        return output


class PackedTokens(Shipped):
    """T valid tokens in the linear layers, gathered to (B, S) in front of each attention and back behind.

    Further inputs: `padded_tokens` (B, S) int64, the token of every place; `valid_tokens` (T,) int64, the
    place of every token. `input_ids` is (T,), and `kept_positions` are among these T.
    """

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind != "GroupQueryAttention":
            super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)
            return
        rows = self.op("Gather", [inputs[0], "padded_tokens"])
        padded = f"{outputs[0]}.padded"
        super().multi_op(
            kind, [rows, *inputs[1:]], outputs=[padded, *outputs[1:]], domain=domain, **attributes
        )
        places = self.op("Reshape", [padded, self.constant("places", [-1, self.architecture.hidden_size])])
        super().multi_op("Gather", [places, "valid_tokens"], outputs=outputs[:1])

    def serialized(self) -> bytes:
        self.inputs = [each for each in self.inputs if each.name != "input_ids"]
        for name, shape in (("input_ids", ["T"]), ("padded_tokens", ["B", "S"]), ("valid_tokens", ["T"])):
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
        return super().serialized()


class AccuracyLevel(Shipped):
    """Block-quantized products at another accuracy level; 4, int8 activations, is shipped."""

    level: ClassVar[int]

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind == "MatMulNBits":
            attributes["accuracy_level"] = self.level
        super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)


class AccuracyLevel0(AccuracyLevel):
    """The runtime's own choice."""

    level = 0


class AccuracyLevel1(AccuracyLevel):
    """float32 activations."""

    level = 1


class PerChannel(Shipped):
    """int8 weights with one scale per output channel, as DynamicQuantizeMatMul; the embedding stays."""

    def linear(self, name: str, x: str, *, weight: str | None = None, output: str | None = None) -> str:
        weight = weight or f"{name}.weight"
        rows, columns = self.shapes[weight]
        inputs = [x, self._levels(weight, (columns, rows)), self.external(f"{weight}.channels", (rows,))]
        bias = f"{name}.bias"
        bias_inputs = [self.external(bias, self.shapes[bias])] if bias in self.shapes else []
        return self.product(inputs, bias_inputs, output)

    def product(self, inputs: Sequence[str], bias: Sequence[str], output: str | None) -> str:
        """X @ levels * scales + bias."""
        inputs = [*inputs, "", *bias] if bias else inputs
        return self.op("DynamicQuantizeMatMul", inputs, output=output, domain=_CONTRIB)

    def _levels(self, weight: str, shape: tuple[int, int]) -> str:
        name = f"{weight}.levels"
        self.external(name, shape, np.uint8)
        self.initializers[name].data_type = TensorProto.INT8
        return name

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        found = dict(shipped)
        for name in self.initializers:
            if name.endswith(".levels"):
                weight = name.removesuffix(".levels")
                levels, found[f"{weight}.channels"] = per_channel(tensor(weight))
                found[name] = np.ascontiguousarray(levels.T)
        return found


class PerChannelInteger(PerChannel):
    """The same in standard operators: DynamicQuantizeLinear and MatMulInteger."""

    def product(self, inputs: Sequence[str], bias: Sequence[str], output: str | None) -> str:
        x, levels, channels = inputs
        names = [f"{levels}.{part}" for part in ("quantized", "scale", "zero")]
        self.multi_op("DynamicQuantizeLinear", [x], outputs=names)
        product = self.op("MatMulInteger", [names[0], levels, names[2]])
        scales = self.op("Mul", [names[1], channels])
        scaled = [self.op("Cast", [product], to=TensorProto.FLOAT), scales]
        if not bias:
            return self.op("Mul", scaled, output=output)
        return self.op("Add", [self.op("Mul", scaled), *bias], output=output)


def per_channel(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Levels (N, K) from -127 to 127 and scales (N,) of a matrix.

    >>> levels, scales = per_channel(np.array([[1.0, -2.0]], np.float32))
    >>> levels.tolist(), round(float(scales[0]), 5)
    ([[64, -127]], 0.01575)
    """
    scales = np.maximum(np.abs(weight).max(1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


class ZeroPoints(Shipped):
    """Four-bit products of the layers with a zero point beside every scale."""

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind == "MatMulNBits" and attributes["bits"] == 4 and not inputs[1].startswith(EMBEDDING):
            weight = inputs[1].removesuffix(".data")
            blocks = -(-attributes["K"] // attributes["block_size"])
            shape = (attributes["N"], -(-blocks // 2))
            inputs = [*inputs[:3], self.external(f"{weight}.zeros", shape, np.uint8), *inputs[4:]]
        super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)

    def weights(self, shipped: Weights, tensor: Tensor) -> Weights:
        found = dict(shipped)
        for name in self.initializers:
            if name.endswith(".zeros"):
                weight = name.removesuffix(".zeros")
                matrix = self.scheme.format_of(weight).fitted(self.shapes[weight][1])
                found |= with_zero_points(weight, tensor(weight), matrix)
        return found


def with_zero_points(name: str, weight: NDArray[np.float32], matrix: MatrixFormat) -> Weights:
    """A matrix in four bits whose blocks' ranges are mapped to 0..15: data, scales and zero points."""
    rows = len(weight)
    values = weight.reshape(rows, -1, matrix.block_size)
    # The range always includes 0, so that 0 is stored exactly.
    largest, smallest = np.maximum(values.max(2), 0), np.minimum(values.min(2), 0)
    scales = np.maximum((largest - smallest) / np.float32(15), np.finfo(np.float32).tiny)
    zeros = np.clip(np.rint(-smallest / scales), 0, 15)
    levels = np.clip(np.rint(values / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    zeros = np.pad(zeros, [(0, 0), (0, zeros.shape[1] % 2)]).astype(np.uint8)
    return {
        f"{name}.data": levels[..., 0::2] | levels[..., 1::2] << 4,
        f"{name}.scales": scales.astype(np.float32),
        f"{name}.zeros": zeros[:, 0::2] | zeros[:, 1::2] << 4,
    }
