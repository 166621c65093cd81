"""Random Llamas with a vocabulary, which llama.cpp's server needs and its library does not.

The tensors are those of `benchmarks.llama_gguf`; the vocabulary is that of our random checkpoints, so that
both servers cut the same texts into the same tokens.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.llama_gguf import describe, ensure_gguf
from benchmarks.random_models import bpe_entries
from benchmarks.shapes import VOCABULARY_SIZE, Shape

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # gguf.TokenType


def ensure_server_gguf(shape: Shape, gguf_type: str, folder: Path) -> Path:
    """The file of this shape and type with a vocabulary, written now if it is not there yet."""
    path = folder / f"llama-{shape.name}-{gguf_type}-vocabulary.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        _write(shape, gguf_type, ensure_gguf(shape, gguf_type, folder), partial)
        partial.replace(path)
    return path


def _write(shape: Shape, gguf_type: str, source: Path, target: Path) -> None:
    import gguf

    kinds = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
    writer = gguf.GGUFWriter(target, "llama")
    describe(writer, shape, kinds[gguf_type])
    _add_vocabulary(writer)
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: object) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    vocabulary, merges = bpe_entries()
    tokens = list(vocabulary)
    kinds = [_NORMAL] * len(tokens)
    end = len(tokens)
    tokens.append("<|end|>")
    kinds.append(_CONTROL)
    tokens += [f"<|unused{i}|>" for i in range(VOCABULARY_SIZE - len(tokens))]
    kinds += [_UNUSED] * (VOCABULARY_SIZE - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
