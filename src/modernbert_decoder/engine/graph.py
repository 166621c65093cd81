"""The ONNX graph of a decoder: from token ids and caches to logits, final states and updated caches.

Everything about the model comes from `DecoderArchitecture`, every weight format from `QuantizationScheme`;
the weights themselves stay outside the graph and are handed to the session by name. This module knows nothing
of sessions, slots or requests, and it is the only one that imports `onnx`.

Legend: B rows, S new tokens per row (right-padded), K kept positions, M with logits, N with states, H heads,
D head width, C model width, V vocabulary or labels, P cache capacity of a full layer, R of a sliding layer.

The rows of a call are dense (B, S) rather than packed: packing the valid tokens needs two gathers per layer,
while the scheduler calls decode rows and prompt chunks separately (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from modernbert_decoder.architecture import ACTIVATIONS, Activation, DecoderArchitecture, Head, LayerKind
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.engine.weights import EMBEDDING_ROWS, rotary_name
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.quantization import MatrixFormat, QuantizationScheme, fused_shapes

_OPSET: Final = 21
_IR_VERSION: Final = 10
_CONTRIB: Final = "com.microsoft"
# int8 activations, quantized per block; levels 0 and 1 unpack the whole matrix on every decode step.
_ACCURACY_INT8: Final = 4
_NUMPY_TYPES: Final = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
}
# Below it a token's largest activation counts as this much: a row of zeros has no scale.
_SMALLEST_PEAK: Final = 1e-30


def build_graph(
    architecture: DecoderArchitecture,
    scheme: QuantizationScheme,
    *,
    num_positions: int,
    activation_levels: int = 127,
    is_for_pieces: bool = False,
    is_selective: bool = False,
    num_stepwise: int = 0,
) -> bytes:
    """The serialized graph, without weights, of the model with its head.

    Inputs: `input_ids` (B, S) int64; `last_positions` (B,) int32, the total length after the call minus 1;
    `longest` () int32, the largest total length; `query_lengths` (B,) int32, valid tokens per row;
    `kept_positions` (K,) int64, indices into the B * S tokens, those of which the last layer is completed;
    `logit_positions` (M,) and `state_positions` (N,) int64, indices into these K; `past_key.i` and
    `past_value.i`. Outputs: `logits` (M, V) of the vocabulary or the labels; `states` (N, C) after the final
    norm; `present_key.i`, `present_value.i`. M and N may be 0: what nobody asks for is not computed. The bare
    model has neither `logits` nor `logit_positions`.

    In a selective graph the last layer takes keys and values of all tokens, but everything else only of those
    that are asked for, Q of each row. There are no `kept_positions`; `logit_positions` and `state_positions`
    are indices into these B * Q. Further inputs: `selected` (B, Q) int64, indices into the B * S tokens;
    `positions` (B, S) and `selected_positions` (B, Q) int64, places in their texts; `visible` (B, 1, Q,
    T + S), 0 where a key is seen and minus infinity elsewhere; `num_keys`, T and S; `is_token` (B, S, 1)
    bool, false for padding. `past_key.i` and `past_value.i` of the last layer hold T positions, its
    `present_key.i` and `present_value.i` those of the new tokens alone, for the caller to put behind the
    others. The weights are those of `selective.divided_projection`.

    In a stepwise graph attention takes the tokens of a row one after another, so that its sums are those of
    so many calls of one token each, while all else is computed for all tokens together. Of up to
    `num_stepwise` places, j = 0, 1, ..., each has its own `last_positions.j`, `longest.j` and
    `query_lengths.j`, all 0 in rows that have fewer tokens, and outputs `present_key.i.j` and
    `present_value.i.j`, to be bound to the memory of `past_key.i` and `past_value.i`, as in every graph.
    `places` (num_stepwise,) int64 names the token of each, any for those that are not used, and
    `token_places` (S,) int64 the place of each token, any for padding.

    Args:
        architecture: of the model.
        scheme: of its weights.
        num_positions: rows of the rotary tables.
        activation_levels: of each sign, where activations are rounded token by token.
        is_for_pieces: made for calls with several tokens of each text, not for single ones; results are the
            same but for rounding.
        is_selective: see above; the last layer must be a full one.
        num_stepwise: see above; 0 for a graph that is not stepwise.

    Raises:
        ConfigurationError: a head width that ONNX Runtime's rotary kernel cannot take.
    """
    if architecture.head_dim % 16:
        raise ConfigurationError(
            f"the head width is {architecture.head_dim} (hidden_size {architecture.hidden_size} / "
            f"num_attention_heads {architecture.num_attention_heads}); the engine needs a multiple of 16"
        )
    assert not (is_selective and num_stepwise), "what selects tokens verifies none"
    assert not (is_for_pieces and num_stepwise), "a stepwise graph takes single tokens"
    graph = _GraphBuilder(architecture, scheme, num_positions, activation_levels, is_for_pieces, num_stepwise)
    graph.build(is_selective=is_selective)
    return graph.serialized()


class _GraphBuilder:
    """Collects nodes, initializers and the graph's inputs and outputs while walking through the model."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        scheme: QuantizationScheme,
        num_positions: int,
        activation_levels: int,
        is_for_pieces: bool = False,
        num_stepwise: int = 0,
    ) -> None:
        self.architecture = architecture
        self.scheme = scheme
        self.num_positions = num_positions
        self.activation_levels = activation_levels
        self.is_for_pieces = is_for_pieces
        self.num_stepwise = num_stepwise
        self.shapes = fused_shapes(architecture)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def build(self, *, is_selective: bool = False) -> None:
        """Walks through the model once, from ids to states and logits."""
        self._declare_inputs()
        x = self.embeddings()
        num_layers = self.architecture.num_hidden_layers
        for index in range(num_layers - 1):
            x = self.layer(index, x)
        if is_selective:
            x = self.selective_layer(num_layers - 1, x)
            x = self.op("Reshape", [x, self.constant("token_rows", [-1, self.architecture.hidden_size])])
        else:
            x = self.last_layer(num_layers - 1, x)
        states = self.op("Gather", [x, "state_positions"])
        self.norm("model.final_norm", states, output="states")
        self.outputs.insert(0, _value("states", TensorProto.FLOAT, ["N", self.architecture.hidden_size]))
        if self.architecture.head is not Head.NONE:
            self.head(self.norm("model.final_norm", self.op("Gather", [x, "logit_positions"])))

    # The model, top down.

    def embeddings(self) -> str:
        """The normalized embeddings (B, S, C) of `input_ids`."""
        matrix = self.scheme.format_of(EMBEDDING).fitted(self.architecture.hidden_size)
        if matrix.bits == 32:
            x = self.op("Gather", [self.external(EMBEDDING, self.shapes[EMBEDDING]), "input_ids"])
        else:
            x = self.op(
                "GatherBlockQuantized",
                [self._gather_data(matrix), "input_ids", self._scales(EMBEDDING, matrix)],
                domain=_CONTRIB,
                bits=matrix.bits,
                block_size=matrix.block_size,
                gather_axis=0,
                quantize_axis=1,
            )
        return self.norm("model.embeddings.norm", x)

    def layer(self, index: int, x: str) -> str:
        """The residual stream (B, S, C) after one layer."""
        name = f"model.layers.{index}"
        # Layer 0 reads the embedding's norm directly: it has no norm of its own.
        h = x if index == 0 else self.norm(f"{name}.attn_norm", x)
        x = self.op("Add", [x, self.attention(index, h)])
        return self.op("Add", [x, self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))])

    def last_layer(self, index: int, x: str) -> str:
        """The residual stream (K, C) of the kept tokens: of others only keys and values are needed."""
        name, width = f"model.layers.{index}", self.architecture.hidden_size
        self.inputs.append(_value("kept_positions", TensorProto.INT64, ["K"]))
        h = x if index == 0 else self.norm(f"{name}.attn_norm", x)
        mixed = self.rows(self.attention_output(index, h), width, "kept_positions")
        x = self.op("Add", [self.rows(x, width, "kept_positions"), self.linear(f"{name}.attn.Wo", mixed)])
        return self.op("Add", [x, self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))])

    def attention(self, index: int, h: str) -> str:
        """Attention (B, S, C), projected onto the residual stream."""
        return self.linear(f"model.layers.{index}.attn.Wo", self.attention_output(index, h))

    def attention_output(self, index: int, h: str) -> str:
        """Rotary attention over past and new tokens, with the cache updated in place."""
        kind = self.architecture.layer_kinds[index]
        name = f"model.layers.{index}.attn"
        qkv = self.linear(f"{name}.Wqkv", h)
        capacity = "R" if kind is LayerKind.SLIDING else "P"
        past = [f"past_key.{index}", f"past_value.{index}"]
        self.inputs += [_value(tensor, TensorProto.FLOAT, self._cache_shape(capacity)) for tensor in past]
        if not self.num_stepwise:
            present = [f"present_key.{index}", f"present_value.{index}"]
            return self.cached_attention(index, qkv, past, present, f"{name}.output")
        parts = [f"{name}.qkv.{j}" for j in range(self.num_stepwise)]
        in_places = self.op("Gather", [qkv, "places"], axis=1)
        self.multi_op("Split", [in_places], outputs=parts, axis=1, num_outputs=len(parts))
        outputs = []
        for j, part in enumerate(parts):
            present = [f"present_key.{index}.{j}", f"present_value.{index}.{j}"]
            output = f"{name}.output.{j}"
            outputs.append(self.cached_attention(index, part, past, present, output, place=f".{j}"))
            past = present  # so that no place is computed before the one before it
        return self.op("Gather", [self.op("Concat", outputs, axis=1), "token_places"], axis=1)

    def cached_attention(
        self,
        index: int,
        qkv: str,
        past: Sequence[str],
        present: Sequence[str],
        output: str,
        *,
        place: str = "",
    ) -> str:
        """Rotary attention of some tokens (B, S, C), with keys and values put into the cache."""
        is_sliding = self.architecture.layer_kinds[index] is LayerKind.SLIDING
        shape = self._cache_shape("R" if is_sliding else "P")
        self.outputs += [_value(tensor, TensorProto.FLOAT, shape) for tensor in present]
        lengths = [f"{name}{place}" for name in ("last_positions", "longest")]
        window = {"local_window_size": self.architecture.window, "sliding_window_cache": 1}
        self.multi_op(
            "GroupQueryAttention",
            # Between tables and sinks it could take positions and a bias, behind them scales and norms.
            [
                *[qkv, "", "", *past, *lengths, *self._rotary_tables(index), "", "", self._sinks()],
                *["", "", "", "", f"query_lengths{place}"],
            ],
            outputs=[output, *present],
            domain=_CONTRIB,
            num_heads=self.architecture.num_attention_heads,
            kv_num_heads=self.architecture.num_attention_heads,
            do_rotary=1,
            **(window if is_sliding else {}),
        )
        return output

    def _sinks(self) -> str:
        """What each head's softmax sums beside its scores, as a logit: nothing.

        With sinks ONNX Runtime writes the scores of all keys before it sums, without them it goes through
        blocks of keys. The former is faster for pieces of longer texts, the latter where many rows bring one
        token each (docs/attention.md).
        """
        if not self.is_for_pieces:
            return ""
        return self.constant("no_sinks", [-np.inf] * self.architecture.num_attention_heads, np.float32)

    def _cache_shape(self, capacity: str) -> list[str | int]:
        return ["B", self.architecture.num_attention_heads, capacity, self.architecture.head_dim]

    def selective_layer(self, index: int, x: str) -> str:
        """The residual stream (B, Q, C) of the selected tokens after a full layer."""
        assert self.architecture.layer_kinds[index] is LayerKind.FULL
        name = f"model.layers.{index}"
        width = self.architecture.hidden_size
        self.inputs += [
            _value("selected", TensorProto.INT64, ["B", "Q"]),
            _value("positions", TensorProto.INT64, ["B", "S"]),
            _value("selected_positions", TensorProto.INT64, ["B", "Q"]),
            _value("visible", TensorProto.FLOAT, ["B", 1, "Q", "T+S"]),
            _value("num_keys", TensorProto.INT64, [2]),
            _value("is_token", TensorProto.BOOL, ["B", "S", 1]),
        ]
        # Attention leaves its results for padding as memory was, maybe NaN, and no mask hides a key of NaN.
        x = self.op("Where", ["is_token", x, self.constant("nothing", 0, np.float32)])
        h = x if index == 0 else self.norm(f"{name}.attn_norm", x)
        x = self.rows(x, width, "selected")
        x = self.op("Add", [x, self.selective_attention(index, h)])
        return self.op("Add", [x, self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))])

    def selective_attention(self, index: int, h: str) -> str:
        """Attention (B, Q, C) of the selected tokens to those visible to them, from plain operators."""
        name, width = f"model.layers.{index}.attn", self.architecture.hidden_size
        self._divide_projection(name)
        query = self.heads(self.linear(f"{name}.Wq", self.rows(h, width, "selected")))
        query = self.rotated(index, query, "selected_positions")
        new_key, new_value = self._new_keys_and_values(index, self.linear(f"{name}.Wkv", h))
        heads, head_width = self.architecture.num_attention_heads, self.architecture.head_dim
        for part, new in (("key", new_key), ("value", new_value)):
            past = _value(f"past_{part}.{index}", TensorProto.FLOAT, ["B", heads, "T", head_width])
            self.inputs.append(past)
            self.outputs.append(_value(new, TensorProto.FLOAT, ["B", heads, "S", head_width]))
        # Past and new keys are met apart: to join their scores, of few queries, costs less than to join them.
        scale = head_width**-0.5
        scores = [
            self.op("FusedMatMul", [query, keys], domain=_CONTRIB, transB=1, alpha=scale)
            for keys in (f"past_key.{index}", new_key)
        ]
        visible = self.op("Add", [self.op("Concat", scores, axis=-1), "visible"])
        weights = [f"{name}.{part}_weights" for part in ("past", "new")]
        self.multi_op("Split", [self.op("Softmax", [visible], axis=-1), "num_keys"], outputs=weights, axis=-1)
        sums = [
            self.op("MatMul", list(pair))
            for pair in zip(weights, (f"past_value.{index}", new_value), strict=True)
        ]
        output = self.op("Transpose", [self.op("Add", sums)], perm=[0, 2, 1, 3])
        return self.linear(
            f"{name}.Wo", self.op("Reshape", [output, self.constant("merged_heads", [0, 0, width])])
        )

    def _divide_projection(self, name: str) -> None:
        """Declares the two parts of `Wqkv` (`selective.divided_projection`) as matrices of their own."""
        rows, columns = self.shapes.pop(f"{name}.Wqkv.weight")
        self.shapes[f"{name}.Wq.weight"] = (rows // 3, columns)
        self.shapes[f"{name}.Wkv.weight"] = (rows // 3 * 2, columns)
        if f"{name}.Wqkv.bias" in self.shapes:
            del self.shapes[f"{name}.Wqkv.bias"]
            self.shapes[f"{name}.Wq.bias"] = (rows // 3,)
            self.shapes[f"{name}.Wkv.bias"] = (rows // 3 * 2,)

    def _new_keys_and_values(self, index: int, pairs: str) -> tuple[str, str]:
        """The outputs with rotated keys and with values, (B, H, S, D) each, out of (B, S, 2C)."""
        heads, head_width = self.architecture.num_attention_heads, self.architecture.head_dim
        shape = self.constant("pair_of_heads", [0, 0, 2, heads, head_width])
        apart = self.op("Transpose", [self.op("Reshape", [pairs, shape])], perm=[2, 0, 3, 1, 4])
        keys, values = f"present_key.{index}", f"present_value.{index}"
        # One index each, as a scalar, so that its axis goes.
        first, second = (self.constant(f"index_{i}", i) for i in (0, 1))
        self.rotated(index, self.op("Gather", [apart, first], axis=0), "positions", output=keys)
        self.op("Gather", [apart, second], axis=0, output=values)
        return keys, values

    def heads(self, x: str) -> str:
        """(B, Q, C) as (B, H, Q, D)."""
        heads, head_width = self.architecture.num_attention_heads, self.architecture.head_dim
        shape = self.constant("heads", [0, 0, heads, head_width])
        return self.op("Transpose", [self.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])

    def rotated(self, index: int, x: str, positions: str, *, output: str | None = None) -> str:
        """Queries or keys (B, H, S, D) at their places in the text."""
        inputs = [x, positions, *self._rotary_tables(index)]
        return self.op("RotaryEmbedding", inputs, output=output, domain=_CONTRIB)

    def rows(self, x: str, width: int, positions: str) -> str:
        """Of the B * S rows of (B, S, width) those at `positions`, (*positions, width)."""
        rows = self.op("Reshape", [x, self.constant("token_rows", [-1, width])])
        return self.op("Gather", [rows, positions])

    def _rotary_tables(self, index: int) -> list[str]:
        rotary = rotary_name(self.architecture, self.architecture.layer_kinds[index])
        table_shape = (self.num_positions, self.architecture.head_dim // 2)
        return [self.external(f"{rotary}.{part}", table_shape) for part in ("cos", "sin")]

    def mlp(self, name: str, h: str) -> str:
        """The gated feed-forward block."""
        # The first half of Wi is activated, the second is the gate.
        halves = [f"{name}.activated", f"{name}.gate"]
        self.multi_op("Split", [self.linear(f"{name}.Wi", h)], outputs=halves, axis=-1, num_outputs=2)
        activated = self.activation(self.architecture.hidden_activation, halves[0])
        return self.linear(f"{name}.Wo", self.op("Mul", [activated, halves[1]]))

    def head(self, x: str) -> None:
        """Logits (M, V) of final states (M, C): the transformation, then the projection."""
        is_classifier = self.architecture.head is Head.SEQUENCE_CLASSIFICATION
        name = "head" if is_classifier else "lm_head"
        h = self.activation(self.architecture.classifier_activation, self.linear(f"{name}.dense", x))
        h = self.norm(f"{name}.norm", h)
        if is_classifier:
            self.linear("classifier", h, output="logits")
            width = self.architecture.num_labels
        else:
            weight = EMBEDDING if self.architecture.tie_word_embeddings else VOCABULARY
            self.linear("decoder", h, weight=weight, output="logits")
            width = self.architecture.vocab_size
        self.outputs.insert(0, _value("logits", TensorProto.FLOAT, ["M", width]))

    # Building blocks.

    def linear(self, name: str, x: str, *, weight: str | None = None, output: str | None = None) -> str:
        """The product with the transposed weight, plus the bias if there is one, in the weight's format."""
        weight = weight or f"{name}.weight"
        rows, columns = self.shapes[weight]
        matrix = self.scheme.format_of(weight).fitted(columns)
        bias = f"{name}.bias"
        bias_inputs = [self.external(bias, self.shapes[bias])] if bias in self.shapes else []
        if matrix.bits == 32:
            inputs = [x, self.external(weight, (rows, columns))]
            if not bias_inputs:
                return self.op("FusedMatMul", inputs, output=output, domain=_CONTRIB, transB=1)
            product = self.op("FusedMatMul", inputs, domain=_CONTRIB, transB=1)
            return self.op("Add", [product, *bias_inputs], output=output)
        if matrix.is_per_row:
            product = self.integer_product(weight, x, output=None if bias_inputs else output)
            return self.op("Add", [product, *bias_inputs], output=output) if bias_inputs else product
        inputs = [x, self._packed_data(weight, rows, columns, matrix), self._scales(weight, matrix)]
        return self.op(
            "MatMulNBits",
            # Between scales and bias it could take zero points and a permutation; there are none.
            [*inputs, "", "", *bias_inputs] if bias_inputs else inputs,
            output=output,
            domain=_CONTRIB,
            K=columns,
            N=rows,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=_ACCURACY_INT8,
        )

    def integer_product(self, weight: str, x: str, *, output: str | None) -> str:
        """The product with a weight of signed bytes, every token's activations rounded with their own scale.

        A token's values are divided by the largest of them, so that one scale serves all tokens and no token
        depends on another; the quotient is multiplied back behind the product.
        """
        rows, columns = self.shapes[weight]
        levels = self.activation_levels
        magnitudes = self.op("Abs", [x])
        peak = self.op("ReduceMax", [magnitudes, self.constant("last_axis", [-1])], keepdims=1)
        peak = self.op("Max", [peak, self.constant("smallest_peak", [_SMALLEST_PEAK], np.float32)])
        scale = self.constant("activation_scale", 1 / levels, np.float32)
        zero_point = self.constant("activation_zero_point", levels + 1, np.uint8)
        rounded = self.op("QuantizeLinear", [self.op("Div", [x, peak]), scale, zero_point])
        data = self.external(f"{weight}.data", (columns, rows), np.int8)
        scales = self.external(f"{weight}.scales", (rows,))
        inputs = [rounded, data, scale, scales, zero_point]
        return self.op("Mul", [self.op("MatMulIntegerToFloat", inputs, domain=_CONTRIB), peak], output=output)

    def norm(self, name: str, x: str, *, output: str | None = None) -> str:
        """Layer normalization over C."""
        inputs = [x, self.external(f"{name}.weight", self.shapes[f"{name}.weight"])]
        if f"{name}.bias" in self.shapes:
            inputs.append(self.external(f"{name}.bias", self.shapes[f"{name}.bias"]))
        return self.op(
            "LayerNormalization", inputs, output=output, axis=-1, epsilon=self.architecture.norm_eps
        )

    def activation(self, name: str, x: str) -> str:
        """The function that a configuration calls `name`, as ONNX operators."""
        match ACTIVATIONS[name]:
            case Activation.GELU:
                return self.op("Gelu", [x], domain=_CONTRIB)
            case Activation.GELU_TANH:
                return self.op("Gelu", [x], approximate="tanh")
            case Activation.RELU:
                return self.op("Relu", [x])
            case Activation.SILU:
                return self.op("Mul", [x, self.op("Sigmoid", [x])])

    # Plumbing.

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        output: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Appends a node with one output and returns that output's name."""
        output = output or f"{kind}_{len(self.nodes)}.0"
        self.multi_op(kind, inputs, outputs=[output], domain=domain, **attributes)
        return output

    def multi_op(
        self, kind: str, inputs: Sequence[str], *, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        """Appends a node with the outputs named."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))

    def external(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> str:
        """Declares an initializer whose bytes the session is given by name."""
        if name not in self.initializers:
            tensor = TensorProto(name=name, data_type=_NUMPY_TYPES[np.dtype(dtype)], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            for key, value in (("location", name), ("offset", "0"), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
            self.initializers[name] = tensor
        return name

    def constant(self, name: str, values: float | Sequence[float], dtype: Any = np.int64) -> str:
        """Declares a small initializer that lies in the graph itself."""
        self.initializers[name] = onnx.numpy_helper.from_array(np.array(values, dtype), name)
        return name

    def _packed_data(self, weight: str, rows: int, columns: int, matrix: MatrixFormat) -> str:
        blocks = -(-columns // matrix.block_size)
        return self.external(f"{weight}.data", (rows, blocks, matrix.block_size * matrix.bits // 8), np.uint8)

    def _scales(self, weight: str, matrix: MatrixFormat) -> str:
        rows, columns = self.shapes[weight]
        return self.external(f"{weight}.scales", (rows, -(-columns // matrix.block_size)))

    def _gather_data(self, matrix: MatrixFormat) -> str:
        """The embedding's bytes as a table of rows: the same memory as `<embedding>.data`, another shape."""
        rows, columns = self.shapes[EMBEDDING]
        return self.external(EMBEDDING_ROWS, (rows, columns * matrix.bits // 8), np.uint8)

    def _declare_inputs(self) -> None:
        self.inputs += [
            _value("input_ids", TensorProto.INT64, ["B", "S"]),
            _value("state_positions", TensorProto.INT64, ["N"]),
        ]
        for place in [f".{j}" for j in range(self.num_stepwise)] or [""]:
            self.inputs += [
                _value(f"last_positions{place}", TensorProto.INT32, ["B"]),
                _value(f"longest{place}", TensorProto.INT32, []),
                _value(f"query_lengths{place}", TensorProto.INT32, ["B"]),
            ]
        if self.num_stepwise:
            self.inputs += [
                _value("places", TensorProto.INT64, [self.num_stepwise]),
                _value("token_places", TensorProto.INT64, ["S"]),
            ]
        if self.architecture.head is not Head.NONE:
            self.inputs.append(_value("logit_positions", TensorProto.INT64, ["M"]))

    def serialized(self) -> bytes:
        """The model in protobuf form."""
        graph = helper.make_graph(
            self.nodes, "modernbert-decoder", self.inputs, self.outputs, list(self.initializers.values())
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())


def _value(name: str, element_type: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def build_probe(length: int) -> bytes:
    """A product of unsigned bytes `left` (M, length) with a matrix of the largest signed ones."""
    right = onnx.numpy_helper.from_array(np.full((length, 16), 127, np.int8), "right")
    node = helper.make_node("MatMulInteger", ["left", "right"], ["product"])
    left = _value("left", TensorProto.UINT8, ["M", length])
    product = _value("product", TensorProto.INT32, ["M", 16])
    graph = helper.make_graph([node], "probe", [left], [product], [right])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
