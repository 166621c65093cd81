"""Random Llama models of the family's shapes as GGUF files, for llama.cpp.

A Llama of the same layers, widths, heads and vocabulary, with the token embedding also serving as the
output matrix. Q8_0 and Q4_0 are "pure": every matrix, the embedding included, has that type.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.shapes import CONTEXT_LENGTH, NORM_EPS, ROPE_THETA, VOCABULARY_SIZE, Shape

if TYPE_CHECKING:
    from gguf import GGUFWriter, LlamaFileType

GGUF_TYPES = ("F32", "Q8_0", "Q4_0")


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape, outermost dimension first (numpy's order)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY_SIZE, hidden)}
    for i in range(shape.num_layers):
        prefix = f"blk.{i}."
        shapes[prefix + "attn_norm.weight"] = (hidden,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"{prefix}{name}.weight"] = (hidden, hidden)
        shapes[prefix + "ffn_norm.weight"] = (hidden,)
        shapes[prefix + "ffn_gate.weight"] = (inner, hidden)
        shapes[prefix + "ffn_up.weight"] = (inner, hidden)
        shapes[prefix + "ffn_down.weight"] = (hidden, inner)
    shapes["output_norm.weight"] = (hidden,)
    return shapes


def describe(writer: GGUFWriter, shape: Shape, file_type: LlamaFileType) -> None:
    """Write the sizes; everything but vocabulary and tensors."""
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(CONTEXT_LENGTH + 1)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_heads)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(VOCABULARY_SIZE)
    writer.add_file_type(file_type)


def write_float32(shape: Shape, path: Path) -> None:
    """Write the float32 model; weights are normal with deviation 0.02, norms are one."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, shape, gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)
    for name, dimensions in tensor_shapes(shape).items():
        if len(dimensions) == 1:
            tensor = np.ones(dimensions, np.float32)
        else:
            tensor = generator.standard_normal(dimensions, dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, gguf_type: str) -> None:
    """Quantize with llama.cpp's own tool, `pure`, the embedding included."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 2
    parameters.pure = True
    parameters.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[
        gguf_type
    ]
    ggml_type = {"Q8_0": llama_cpp.GGML_TYPE_Q8_0, "Q4_0": llama_cpp.GGML_TYPE_Q4_0}[gguf_type]
    parameters.token_embedding_type = ggml_type
    parameters.output_tensor_type = ggml_type
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize answered {status} for {target.name}")


def gguf_path(size: str, gguf_type: str, folder: Path) -> Path:
    """Where `ensure_gguf` keeps a file."""
    return folder / f"llama-{size}-{gguf_type}.gguf"


def ensure_gguf(shape: Shape, gguf_type: str, folder: Path) -> Path:
    """The file of this shape and type in `folder`, written now if it is not there yet."""
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"unknown GGUF type {gguf_type!r}; known: {', '.join(GGUF_TYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = gguf_path(shape.name, gguf_type, folder)
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    if gguf_type == "F32":
        write_float32(shape, partial)
    else:
        quantize(ensure_gguf(shape, "F32", folder), partial, gguf_type)
    partial.replace(path)
    return path
