"""An attention node as the package builds it, and in the forms it could have; bound to arrays of one call.

It knows nothing of time.

Legend: B rows of a call, S new tokens per row, P tokens before them, C model width, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from modernbert_decoder.architecture import DecoderArchitecture, LayerKind
from modernbert_decoder.engine.graph import _GraphBuilder
from modernbert_decoder.engine.rings import ring_capacity, ring_length
from modernbert_decoder.engine.session import open_session, shared_value
from modernbert_decoder.engine.weights import rotary_tables
from modernbert_decoder.quantization import QuantizationScheme

NUM_POSITIONS = 8192
_ATTENTION = "GroupQueryAttention"
_QUANTUM = 0.03  # of keys and values in 8 bits, whose values are drawn from a normal distribution


@dataclass(frozen=True)
class Shape:
    """One call: B rows with S new tokens each, behind P others, caches with room for `capacity`."""

    rows: int
    new_tokens: int
    past_tokens: int
    capacity: int


class Node(_GraphBuilder):
    """The attention of one layer: packed queries, keys and values in, mixed values out."""

    name: ClassVar[str] = "blocks of keys"
    has_sinks: ClassVar[bool] = False
    element_type: ClassVar[int] = TensorProto.FLOAT
    cache_type: ClassVar[type[np.generic]] = np.float32

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__(
            architecture, QuantizationScheme.named("float32"), NUM_POSITIONS, 127, self.has_sinks
        )

    def build_node(self, index: int) -> bytes:
        """The serialized graph of layer `index`'s attention."""
        width = self.architecture.hidden_size
        past = [f"past_{part}.{index}" for part in ("key", "value")]
        is_sliding = self.architecture.layer_kinds[index] is LayerKind.SLIDING
        shape = self._cache_shape("R" if is_sliding else "P")
        self.inputs += [
            helper.make_tensor_value_info("qkv", TensorProto.FLOAT, ["B", "S", 3 * width]),
            helper.make_tensor_value_info("last_positions", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("longest", TensorProto.INT32, []),
            helper.make_tensor_value_info("query_lengths", TensorProto.INT32, ["B"]),
            *(helper.make_tensor_value_info(name, self.element_type, shape) for name in past),
        ]
        present = [name.replace("past", "present") for name in past]
        self.cached_attention(index, "qkv", past, present, "mixed")
        for value in self.outputs:
            value.type.tensor_type.elem_type = self.element_type
        self.outputs.append(helper.make_tensor_value_info("mixed", TensorProto.FLOAT, ["B", "S", width]))
        return self.serialized()


class WholeScores(Node):
    """With sinks of nothing: all scores are written before they are summed."""

    name = "whole scores"
    has_sinks = True


class EightBits(Node):
    """Keys and values as bytes, with one scale per channel that is known beforehand."""

    name = "keys and values in 8 bits"
    element_type = TensorProto.INT8
    cache_type = np.int8

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        if kind == _ATTENTION:
            scales = self.constant("scales", [_QUANTUM] * self.architecture.hidden_size, np.float32)
            inputs = [*inputs[:12], scales, scales, *inputs[14:]]
            attributes |= dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
            attributes["kv_cache_bit_width"] = 8
        super().multi_op(kind, inputs, outputs=outputs, domain=domain, **attributes)


FORMS: tuple[type[Node], ...] = (Node, WholeScores, EightBits)


class Attention:
    """A session of one node, bound to random arrays of one call.

    Attributes:
        mixed: (B, S, C) what it puts out.
    """

    def __init__(
        self,
        form: type[Node],
        architecture: DecoderArchitecture,
        kind: LayerKind,
        shape: Shape,
        *,
        threads: int,
    ) -> None:
        index = architecture.layer_kinds.index(kind)
        tables = rotary_tables(architecture, NUM_POSITIONS)
        graph = form(architecture).build_node(index)
        used = {name: array for name, array in tables.items() if name.encode() in graph}
        self._session = open_session(
            graph, list(used), list(used.values()), threads=threads, providers=["CPUExecutionProvider"]
        )
        rng = np.random.default_rng(0)
        rows, new, past = shape.rows, shape.new_tokens, shape.past_tokens
        is_sliding = kind is LayerKind.SLIDING
        capacity = ring_capacity(architecture) if is_sliding else shape.capacity
        held = ring_length(past, capacity, architecture.window) if is_sliding else past
        caches = [
            _cache(rng, form, (rows, architecture.num_attention_heads, capacity, architecture.head_dim), held)
            for _ in ("key", "value")
        ]
        self.mixed = np.zeros((rows, new, architecture.hidden_size), np.float32)
        self._arrays: dict[str, NDArray[Any]] = {
            "qkv": rng.standard_normal((rows, new, 3 * architecture.hidden_size), np.float32),
            "last_positions": np.full(rows, past + new - 1, np.int32),
            "longest": np.array(past + new, np.int32),
            "query_lengths": np.full(rows, new, np.int32),
        }
        self._held = [*used.values(), *caches]
        self._binding = self._session.io_binding()
        for name, array in self._arrays.items():
            self._binding.bind_ortvalue_input(name, shared_value(array))
        for part, array in zip(("key", "value"), caches, strict=True):
            value = shared_value(array)
            self._binding.bind_ortvalue_input(f"past_{part}.{index}", value)
            self._binding.bind_ortvalue_output(f"present_{part}.{index}", value)
        self._binding.bind_ortvalue_output("mixed", shared_value(self.mixed))

    def run(self) -> None:
        """The same call again: what it writes into the caches is what it wrote there before."""
        self._session.run_with_iobinding(self._binding)


def _cache(
    rng: np.random.Generator, form: type[Node], shape: tuple[int, ...], held: int
) -> NDArray[np.generic]:
    values = np.zeros(shape, np.float32)
    values[:, :, :held] = rng.standard_normal((*shape[:2], held, shape[3]), np.float32)
    if form.cache_type is np.int8:
        return np.clip(np.rint(values / _QUANTUM), -128, 127).astype(np.int8)
    return values
