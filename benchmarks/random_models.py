"""Random checkpoints of the released shapes, in the format of real ones, with a tokenizer of full size.

Speed does not depend on the values, so random ones stand in for downloads. Written once into a folder that
git ignores; nothing here measures anything.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from modernbert_decoder.architecture import DecoderArchitecture, released_architecture
from modernbert_decoder.checkpoint import write_safetensors

_NUM_BPE_ENTRIES = 50_280
_SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
_NUM_UNUSED = 83
_DEVIATION = 0.02


def ensure_checkpoint(size: str, folder: Path) -> Path:
    """The random checkpoint of this size in `folder`, written now if it is not there yet."""
    target = folder / f"random-{size}"
    if (target / "model.safetensors").exists():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    architecture = released_architecture(size)
    (target / "config.json").write_text(json.dumps(architecture.to_config(), indent=2) + "\n")
    write_tokenizer(target)
    write_safetensors(target / "model.safetensors", random_tensors(architecture), {"format": "pt"})
    return target


def random_tensors(architecture: DecoderArchitecture) -> dict[str, np.ndarray]:
    """Checkpoint name -> float32 array: normal matrices, norms of one, biases of zero."""
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in architecture.tensor_shapes().items():
        if len(shape) == 2:
            tensors[name] = generator.standard_normal(shape, dtype=np.float32) * np.float32(_DEVIATION)
        else:
            tensors[name] = (np.zeros if name.endswith("bias") else np.ones)(shape, np.float32)
    return tensors


def bpe_entries() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary of full size: the bytes, then pairs and triples of printable characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(33, 127)]
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    pairs = [(a, b) for a in printable for b in printable]
    for left, right in pairs + [(a + b, c) for a, b in pairs for c in printable]:
        if len(vocabulary) == _NUM_BPE_ENTRIES:
            break
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    return vocabulary, merges


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, of the size and kind of the released models' own."""
    vocabulary, merges = bpe_entries()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*_SPECIAL_TOKENS, *(f"[unused{i}]" for i in range(_NUM_UNUSED))]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[: len(_SPECIAL_TOKENS)]])
    tokenizer.add_tokens([AddedToken(name) for name in names[len(_SPECIAL_TOKENS) :]])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 7999,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
