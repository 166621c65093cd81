"""Random checkpoints of the other formats: transformers' encoder, and the trainer's FlexBERT.

Written independently of the code that converts them, from the same random values as `checkpoints.py` gives
the decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import Tensors, byte_tokenizer, random_tensors, tiny_architecture
from modernbert_decoder.architecture import DecoderArchitecture, Head, LayerKind
from modernbert_decoder.safetensors_files import SafetensorsFile, write_safetensors


def stored_as(tensors: Mapping[str, NDArray[Any]], dtype: str) -> Tensors:
    """Float32 arrays as the bits of a type: bfloat16 by cutting off the lower half."""
    if dtype == "BF16":
        return {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors.items()}
    return {
        name: array.astype({"F32": np.float32, "F16": np.float16}[dtype]) for name, array in tensors.items()
    }


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors, *, dtype: str = "F32") -> Path:
    """A checkpoint folder with the byte tokenizer and a file that names its special tokens."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bits = stored_as(tensors, dtype)
    is_bfloat16 = dtype == "BF16"
    write_safetensors(
        folder / "model.safetensors", bits, {"format": "pt"}, bfloat16=tensors.keys() if is_bfloat16 else ()
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": {"content": "[PAD]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def encoder_tensors(architecture: DecoderArchitecture, *, seed: int = 0) -> Tensors:
    """Random tensors under the names of transformers' encoder classes."""
    split = random_tensors(architecture, seed=seed)
    tensors: Tensors = {}
    for name, array in split.items():
        if ".q_proj." in name:
            parts = [split[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[name.replace("q_proj", "Wqkv")] = np.concatenate(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name.replace("lm_head.", "head.")] = array
    return tensors


def encoder_config(architecture: DecoderArchitecture, **changes: Any) -> dict[str, Any]:
    """As transformers 4.57 writes an encoder: no layer_types, no rope_parameters, no sliding_window."""
    config = architecture.to_config(warn=False)
    for key in ("layer_types", "rope_parameters", "sliding_window", "use_cache"):
        del config[key]
    classes = {Head.CAUSAL_LM: "ModernBertForMaskedLM", Head.NONE: "ModernBertModel"}
    config |= {
        "model_type": "modernbert",
        "architectures": [classes[architecture.head]],
        "classifier_pooling": "mean",
        "position_embedding_type": "absolute",
        "layer_norm_eps": architecture.norm_eps,
        "deterministic_flash_attn": False,
        "torch_dtype": "float32",
        "transformers_version": "4.57.6",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not ...}


def write_encoder(
    folder: Path, architecture: DecoderArchitecture | None = None, *, dtype: str = "F32", **changes: Any
) -> Path:
    architecture = architecture or tiny_architecture()
    return write(folder, encoder_config(architecture, **changes), encoder_tensors(architecture), dtype=dtype)


def flexbert_config(architecture: DecoderArchitecture, **changes: Any) -> dict[str, Any]:
    """The keys of a training recipe, as composer exports them (BERT's own among them)."""
    a = architecture
    config = {
        "model_type": "bert",
        **{key: getattr(a, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": a.intermediate_size,
        "vocab_size": a.vocab_size - 3,  # rounded up by the trainer
        "max_position_embeddings": 512,
        "max_seq_len": 2048,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "attention_layer": "rope",
        "attn_qkv_bias": a.attention_bias,
        "attn_out_bias": a.attention_bias,
        "attn_out_dropout_prob": 0.1,
        "bert_layer": "prenorm",
        "embed_norm": True,
        "final_norm": True,
        "skip_first_prenorm": True,
        "embedding_layer": "sans_pos",
        "loss_function": "fa_cross_entropy",
        "mlp_in_bias": a.mlp_bias,
        "mlp_out_bias": a.mlp_bias,
        "mlp_layer": "glu",
        "normalization": "layernorm",
        "norm_kwargs": {"eps": a.norm_eps, "bias": a.norm_bias},
        "hidden_act": "gelu",
        "head_pred_act": "gelu",
        "head_pred_bias": a.classifier_bias,
        "decoder_bias": a.decoder_bias,
        "tie_word_embeddings": a.tie_word_embeddings,
        "padding": "unpadded",
        "rotary_emb_base": a.rotary[LayerKind.FULL].theta,
        "local_attn_rotary_emb_base": a.rotary[LayerKind.SLIDING].theta,
        "sliding_window": 2 * a.window,
        "global_attn_every_n_layers": 3,
        "causal_mask": True,
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


def flexbert_tensors(tensors: Tensors, *, prefix: str = "model.") -> Tensors:
    """Encoder tensors under the trainer's names, with the copy of the embedding that it saves."""
    renamed: Tensors = {}
    for name, array in tensors.items():
        own_name = re.sub(r"^model\.layers\.", "bert.encoder.layers.", name)
        renamed[prefix + re.sub(r"^model\.", "bert.", own_name)] = array
    return {f"{prefix}decoder.weight": renamed[f"{prefix}bert.embeddings.tok_embeddings.weight"], **renamed}


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor name -> type, shape, bytes."""
    file = SafetensorsFile(folder / "model.safetensors")
    return {
        name: (tensor.dtype, tensor.shape, file.raw(name).tobytes()) for name, tensor in file.tensors.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
