"""Random checkpoints in Hugging Face format, a byte tokenizer to go with them, and runtimes on them.

Weights are scaled like those of a trained model: activations stay near 1, attention is peaked, logits spread,
and greedy decoding wanders instead of repeating one token. Everything follows from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, LayerKind, RotaryParameters
from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint, write_safetensors
from modernbert_decoder.engine.batch_invariance import Pairs
from modernbert_decoder.engine.calls import Row, Stepwise
from modernbert_decoder.engine.graph import build_graph
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.selective import divided_projection
from modernbert_decoder.engine.weights import load_weights, rotary_tables
from modernbert_decoder.quantization import QuantizationScheme
from modernbert_decoder.spellings import layer_kinds_every

Tensors = dict[str, NDArray[Any]]
Float32 = NDArray[np.float32]

CLS, SEP, PAD = 256, 257, 258
BUNDLED_ARCHITECTURE = DecoderArchitecture.from_folder(find_checkpoint(BUNDLED_MODEL))
_TINY: Mapping[str, Any] = {
    "vocab_size": 320,  # more than the tokenizer has: ids 259 and up have no text
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "cls_token_id": CLS,
    "sep_token_id": SEP,
    "eos_token_ids": (SEP,),
}
# Queries and keys are this much larger than keeps a row's norm: attention then prefers some keys clearly.
_ATTENTION_GAIN = 2.0


def tiny_architecture(*, full_every: int = 3, **changes: Any) -> DecoderArchitecture:
    """Four layers (full, sliding, sliding, full) of width 64 with two heads of 32, unless changed."""
    values = {**_TINY, **changes}
    values.setdefault("layer_kinds", layer_kinds_every(values["num_hidden_layers"], full_every))
    values.setdefault("rotary", {kind: RotaryParameters() for kind in LayerKind})
    return DecoderArchitecture(**values)


def random_tensors(architecture: DecoderArchitecture, *, seed: int = 0) -> Tensors:
    """Tensor name -> float32 array, as the checkpoint of that architecture names them."""
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in architecture.tensor_shapes().items():
        values = generator.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = 1 + np.float32(0.1) * values
        elif len(shape) == 1 or "embeddings" in name or name == "decoder.weight":
            tensors[name] = np.float32(0.1) * values
        else:
            gain = _ATTENTION_GAIN if ".q_proj." in name or ".k_proj." in name else 1.0
            tensors[name] = np.float32(gain * shape[1] ** -0.5) * values
    return tensors


def write_checkpoint(
    folder: Path,
    architecture: DecoderArchitecture,
    *,
    seed: int = 0,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config, weights and, for a vocabulary laid out for it, the byte tokenizer; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = architecture.to_config(warn=False) if config is None else config
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    weights = random_tensors(architecture, seed=seed) if tensors is None else tensors
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    if architecture.cls_token_id == CLS:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, id = byte, and behind them [CLS], [SEP] and [PAD]: half characters are common."""
    alphabet = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [], byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256)]


def open_runtime(
    folder: Path,
    *,
    scheme: QuantizationScheme | str = "float32",
    num_slots: int = 2,
    context_length: int = 2048,
    threads: int = 1,
    is_for_pieces: bool = False,
    is_selective: bool = False,
    pairs: Pairs | None = None,
    num_stepwise: int = 0,
) -> Runtime:
    """A runtime on a checkpoint, without `LLM`, scheduler and graph cache."""
    checkpoint = Checkpoint.open(folder)
    architecture = checkpoint.architecture
    if isinstance(scheme, str):
        scheme = QuantizationScheme.named(scheme)
    weights = load_weights(checkpoint, scheme, threads=threads)
    if is_selective:
        weights = divided_projection(weights, architecture, scheme)
    build = partial(build_graph, architecture, scheme, num_positions=context_length)
    return Runtime(
        architecture,
        build(is_for_pieces=is_for_pieces, is_selective=is_selective),
        {**weights, **rotary_tables(architecture, context_length)},
        num_slots=num_slots,
        context_length=context_length,
        threads=threads,
        providers=["CPUExecutionProvider"],
        is_selective=is_selective,
        pairs=pairs,
        stepwise=Stepwise(partial(build, num_stepwise=num_stepwise), num_stepwise) if num_stepwise else None,
    )


def whole_logits(runtime: Runtime, ids: Sequence[int]) -> Float32:
    """The logits (T, V) of a text fed as one row into a slot of its own, which is given back."""
    slot = runtime.cache.allocate()
    logits = runtime.step([Row(slot, ids, len(ids))])[0].copy()
    runtime.cache.free(slot)
    return logits


def random_ids(architecture: DecoderArchitecture, length: int, *, seed: int = 0) -> list[int]:
    """`length` ids of the vocabulary, none of them an end of text."""
    ids = np.random.default_rng([seed, length]).integers(0, architecture.vocab_size, length).tolist()
    return [0 if token_id in architecture.eos_token_ids else token_id for token_id in ids]


def relative_error(values: NDArray[Any], reference: NDArray[Any]) -> float:
    """The largest absolute difference divided by the largest absolute value of the reference."""
    return float(np.abs(values - reference).max() / np.abs(reference).max())
