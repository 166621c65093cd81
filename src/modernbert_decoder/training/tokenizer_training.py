"""The tokenizer of a run: trained from its data, or read from a folder or the Hub; written beside a model.

Byte-level BPE with the five special tokens and the template that the package's tokenizer expects. Knows no
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from modernbert_decoder.atomic_files import new_file
from modernbert_decoder.errors import InputError, ModelNotFoundError
from modernbert_decoder.training.documents import DocumentStream, Source
from modernbert_decoder.training.encoding import encodable
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.recipe import TokenizerTraining

SPECIAL_TOKENS: Final = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TrainingTokenizer:
    """A tokenizer and the ids of its special tokens.

    Attributes:
        tokenizer: it.
        vocab_size: ids, special ones included.
        cls_token_id: begins a document.
        sep_token_id: ends it.
        pad_token_id: fills a batch.
        mask_token_id: None: there is none.
    """

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    mask_token_id: int | None

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, *, source: str) -> TrainingTokenizer:
        """Looks the special tokens up.

        Raises:
            RecipeError: it lacks one that training needs.
        """
        cls_id, sep_id, pad_id, mask_id = map(tokenizer.token_to_id, SPECIAL_TOKENS[1:])
        if cls_id is None or sep_id is None or pad_id is None:
            needed = {"[CLS]": cls_id, "[SEP]": sep_id, "[PAD]": pad_id}
            missing = [token for token, token_id in needed.items() if token_id is None]
            raise RecipeError(
                f"the tokenizer of {source} has no {', '.join(missing)}, with which documents begin and end "
                "and batches are filled; choose the tokenizer of a ModernBERT decoder, or train one "
                "(tokenizer.train)"
            )
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        return cls(tokenizer, size, cls_id, sep_id, pad_id, mask_id)

    def write(self, folder: Path, *, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers and the engine read them."""
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        names |= {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{key: token for key, token in names.items() if self.tokenizer.token_to_id(token) is not None},
        }
        with new_file(folder / "tokenizer.json") as file:
            file.write(self.tokenizer.to_str(pretty=False).encode())
        with new_file(folder / "tokenizer_config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())


def train_tokenizer(source: Source, settings: TokenizerTraining, *, seed: int) -> TrainingTokenizer:
    """Train a tokenizer on the first documents of the data, in the order of the seed.

    Raises:
        InputError: the data is already tokenized, or too small for so many entries.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(source, settings.max_bytes, seed=seed), trainer)
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    if found < settings.vocab_size:
        raise InputError(
            f"the data gives a vocabulary of {found} entries only; set tokenizer.train.vocab_size to that or "
            f"less, not {settings.vocab_size}"
        )
    trained = TrainingTokenizer.of(tokenizer, source="this run")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", trained.cls_token_id), ("[SEP]", trained.sep_token_id)],
    )
    return trained


def read_tokenizer(source: str) -> TrainingTokenizer:
    """The tokenizer of a folder or, if there is no such folder, of a Hub repository.

    Raises:
        ModelNotFoundError: nothing was found.
        InputError: what was found cannot be read.
        RecipeError: it lacks special tokens.
    """
    path = _tokenizer_file(source)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"cannot read {path}: {error}") from error
    return TrainingTokenizer.of(tokenizer, source=source)


def _tokenizer_file(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            raise ModelNotFoundError(f"{folder} holds no tokenizer.json; name another tokenizer.source")
        return folder / "tokenizer.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "tokenizer.json"))
    except Exception as error:  # of the network, the Hub, or its client's validation of the name
        raise ModelNotFoundError(
            f"tokenizer.source is {source!r}: there is no such folder, and the Hub did not give its "
            f"tokenizer.json: {error}"
        ) from error


def _texts(source: Source, max_bytes: int, *, seed: int) -> Iterator[str]:
    """Documents of one epoch at most, until there are so many bytes; the last of them is whole."""
    stream = DocumentStream(source, seed=seed)
    num_bytes = 0
    try:
        while num_bytes < max_bytes:
            (document,) = stream.read_block(1)  # a larger block could be of the next epoch
            if stream.epoch > 0:
                return
            if not isinstance(document, str):
                raise InputError(
                    "the documents are token ids (data.ids_key), of which no tokenizer can be trained"
                )
            text = encodable(document)
            num_bytes += len(text.encode())
            yield text
    finally:
        stream.close()
