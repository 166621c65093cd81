"""Text to token ids and back: `[CLS]` in front of a prompt, never `[SEP]` behind it, decoding exact.

Reads `tokenizer.json` (byte-level BPE) with the tokenizers library, which does the encoding; decoding is done
here on bytes, so that streaming costs a table look-up per token. It knows no model beyond the size of its
vocabulary and its special ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.errors import CheckpointError, InputError, ModelNotFoundError
from modernbert_decoder.templates import Template
from modernbert_decoder.text_pieces import Continued, FirstTokens, PieceEncoder, without_surrogates


class Tokenizer:
    """The tokenizer of one model folder.

    Text that spells a special token, such as "[SEP]", becomes that token, as it does in transformers. Lone
    surrogates, which are not text, are read as U+FFFD. Decoded text is what the tokens say: the
    `clean_up_tokenization_spaces` of some `tokenizer_config.json` files, with which transformers turns " ."
    into ".", is not applied.

    Attributes:
        vocab_size: number of tokens, added ones included.
        cls_token_id: stands in front of every text.
        sep_token_id: ends a text; None when neither the tokenizer nor the architecture names one.
        pad_token_id: None when neither names one.
        special_token_ids: those that are no text.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, special_ids: Mapping[str, int | None], num_ids: int
    ) -> None:
        """For `from_folder`, which has checked all of this; `num_ids`: rows of the embedding."""
        cls_token_id = special_ids["cls"]
        assert cls_token_id is not None
        self._tokenizer = tokenizer
        self._pieces = PieceEncoder(tokenizer)
        self._templates: dict[int, Template] = {}  # by their number of texts, 1 or 2
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.cls_token_id = cls_token_id
        self.sep_token_id = special_ids["sep"]
        self.pad_token_id = special_ids["pad"]
        added = tokenizer.get_added_tokens_decoder()
        skipped = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_token_ids = skipped
        self._all_bytes = _TokenBytes(tokenizer, skipped=frozenset(), num_ids=num_ids)
        self._text_bytes = _TokenBytes(tokenizer, skipped=skipped, num_ids=num_ids)
        self._plain: tokenizers.Tokenizer | None = None

    @classmethod
    def from_folder(cls, folder: Path, architecture: DecoderArchitecture) -> Tokenizer:
        """Load `tokenizer.json`, and the special tokens' names from `tokenizer_config.json` if there is one.

        Raises:
            ModelNotFoundError: there is no `tokenizer.json`.
            CheckpointError: it cannot be read, is not byte-level, or does not fit the architecture: more ids
                than the embedding has rows, or another `[CLS]` or `[SEP]` than `config.json` states.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFoundError(
                f"{folder} holds no tokenizer.json; copy the tokenizer files of the model it was trained "
                "from into it"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"cannot read {path}: {error}. Download or copy it again") from error
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise CheckpointError(
                f"{path}: the decoder is {type(tokenizer.decoder).__name__}, but only byte-level tokenizers "
                "(decoder ByteLevel), as all ModernBERT decoders have, can be used"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_vocabulary(path, tokenizer, architecture.vocab_size)
        special_ids = _special_ids(folder, tokenizer, architecture)
        if tokenizer.post_processor is None:
            tokenizer.post_processor = _documented_template(special_ids, path)
        return cls(tokenizer, special_ids=special_ids, num_ids=architecture.vocab_size)

    def encode(self, text: str) -> list[int]:
        """`[CLS]` and the ids of the text, for generating and scoring; empty text gives `[CLS]` alone."""
        return self.encode_batch([text])[0]

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text alone, in which names of special tokens are text like any other."""
        ids = self.encode(text)[1:]
        if self.special_token_ids.isdisjoint(ids):
            return ids
        if self._plain is None:
            plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        plain_ids: list[int] = self._plain.encode(without_surrogates(text), add_special_tokens=False).ids
        return plain_ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores (environment TOKENIZERS_PARALLELISM=false: on one)."""
        return self._pieces.ids(texts, lead=(self.cls_token_id,))

    def encode_continuations(self, text: str, continuations: Sequence[str]) -> Continued:
        """`encode` of a text and of the text with each continuation, most of which is done once for all."""
        return self._pieces.continued(text, continuations, lead=(self.cls_token_id,))

    def first_ids(self, text: str, count: int) -> list[int]:
        """The first `count` ids of a text, without `[CLS]`; a long text is not tokenized much further."""
        (first,) = self._pieces.first_tokens([text], count=count, counts_all=False)
        return first.ids

    def encode_template(
        self,
        text: str,
        pair: str | None = None,
        *,
        max_length: int | None = None,
        truncation: str | None = "longest_first",
    ) -> list[int]:
        """The ids in the file's template, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

        It is what classifiers and embedding models are trained with.

        Args:
            text: A.
            pair: B.
            max_length: most ids; A and B are shortened from their ends, the template's own tokens stay.
            truncation: which of the two is shortened: "longest_first", "only_first" or "only_second", as in
                transformers; None refuses longer texts.

        Raises:
            TextTooLongError: the text has more than `max_length` tokens, and `truncation` is None.
            InputError: `max_length` does not even hold the template's own tokens, or the text that may be
                shortened would have to lose all of its own.
        """
        texts: list[str | tuple[str, str]] = [text if pair is None else (text, pair)]
        (ids,) = self.encode_template_batch(texts, max_length=max_length, truncation=truncation)
        if isinstance(ids, InputError):
            raise ids
        return ids

    def encode_template_batch(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        max_length: int | None = None,
        truncation: str | None = "longest_first",
    ) -> list[list[int] | InputError]:
        """`encode_template` for many texts and pairs, on as many cores as `encode_batch`.

        In place of ids there is the error of a text that cannot be used.
        """
        # Of a pair, both lengths are needed to know how much of each is kept.
        singles = iter(
            self._first_tokens(
                [text for text in texts if isinstance(text, str)],
                max_length,
                counts_all=truncation is None,
            )
        )
        halves = iter(
            self._first_tokens(
                [half for text in texts if not isinstance(text, str) for half in text],
                max_length,
                counts_all=True,
            )
        )
        results: list[list[int] | InputError] = []
        for text in texts:
            parts = [next(singles)] if isinstance(text, str) else [next(halves), next(halves)]
            try:
                template = self._template(len(parts))
                results.append(template.joined(parts, max_length=max_length, truncation=truncation))
            except InputError as error:
                results.append(error)
        return results

    def num_bytes(self, text: str | Sequence[int]) -> int:
        """UTF-8 bytes of a text; of ids, those that they stand for, special tokens none."""
        if isinstance(text, str):
            return len(without_surrogates(text).encode())
        return sum(len(self._text_bytes[token_id]) for token_id in text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing.

        Raises:
            InputError: an id is negative or beyond the model's vocabulary.
        """
        table = self._text_bytes if skip_special_tokens else self._all_bytes
        return b"".join(map(table.__getitem__, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, possibly only a part of a character; a special token's are its
        name.
        """
        return self._all_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text, for display: U+FFFD where it holds only a part of a character; special tokens by
        name.
        """
        return self._all_bytes[token_id].decode("utf-8", "replace")

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both."""
        first, second = (each._tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        return first == second

    def detokenizer(self, *, skip_special_tokens: bool = True) -> StreamingDetokenizer:
        """A new detokenizer for one stream of ids."""
        return StreamingDetokenizer(self._text_bytes if skip_special_tokens else self._all_bytes)

    def _first_tokens(
        self, texts: Sequence[str], max_length: int | None, *, counts_all: bool
    ) -> list[FirstTokens]:
        if max_length is None:
            return [FirstTokens(ids, len(ids)) for ids in self._pieces.ids(texts)]
        return self._pieces.first_tokens(texts, count=max_length, counts_all=counts_all)

    def _template(self, num_texts: int) -> Template:
        if num_texts not in self._templates:
            self._templates[num_texts] = Template(self._tokenizer, num_texts=num_texts)
        return self._templates[num_texts]


class StreamingDetokenizer:
    """Turns ids into text one by one; all it returns, put together, equals `Tokenizer.decode` of all the
    ids.
    """

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        """Made by `Tokenizer.detokenizer`."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []

    def put(self, token_id: int) -> str:
        """The text that this token completes: "" as long as a character is incomplete.

        Raises:
            InputError: the id is negative or beyond the model's vocabulary.
        """
        new_text = self._decoder.decode(self._token_bytes[token_id])
        if new_text:
            self._pieces.append(new_text)
        return new_text

    def finish(self) -> str:
        """End the stream: U+FFFD if it ended within a character, else ""."""
        new_text = self._decoder.decode(b"", True)
        if new_text:
            self._pieces.append(new_text)
        return new_text

    @property
    def text(self) -> str:
        """Everything returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""


class _TokenBytes(dict[int, bytes]):
    """Token id -> bytes, filled as ids are met, since a whole table takes longer than the first tokens of a
    model.

    The bytes of consecutive tokens are simply joined, as the tokenizers library does: a token whose
    characters are all in GPT-2's byte alphabet stands for those bytes, any other (an added token with spaces,
    say) for its UTF-8.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skipped: frozenset[int], num_ids: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._num_ids = num_ids
        self._byte_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._num_ids:
            raise InputError(
                f"token id {token_id} is not between 0 and {self._num_ids - 1}, the model's vocabulary"
            )
        token_id = int(token_id)
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            data = b""
        elif all(character in self._byte_of for character in token):
            data = bytes(self._byte_of[character] for character in token)
        else:
            data = token.encode()
        self[token_id] = data
        return data


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable Latin-1 stands for itself, the rest for
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _check_vocabulary(path: Path, tokenizer: tokenizers.Tokenizer, num_ids: int) -> None:
    """Every id the tokenizer can give must have a row in the embedding."""
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    if num_tokens <= num_ids and None not in map(tokenizer.id_to_token, range(num_tokens)):
        return  # ids 0 .. num_tokens - 1: the usual case, found without building the vocabulary
    too_large = sorted(
        (i, token) for token, i in tokenizer.get_vocab(with_added_tokens=True).items() if i >= num_ids
    )
    if too_large:
        token_id, token = too_large[0]
        raise CheckpointError(
            f"{path} has {len(too_large)} tokens beyond the embedding's {num_ids} rows (vocab_size in "
            f"config.json), the first is {token!r} with id {token_id}; it belongs to another model, or the "
            "embedding was not resized"
        )


def _special_ids(
    folder: Path, tokenizer: tokenizers.Tokenizer, architecture: DecoderArchitecture
) -> dict[str, int | None]:
    """The ids of [CLS], [SEP] and [PAD].

    `tokenizer_config.json` names them; `config.json` must agree, or fills in what is not named there. For
    padding, which no result depends on, the tokenizer's own id is taken whatever the architecture says, since
    fine-tuned models often set only one of the two.
    """
    path = folder / "tokenizer_config.json"
    config = _read_config(path)
    cls_token_id = _named_id(path, config, tokenizer, ("cls_token", "bos_token"))
    sep_token_id = _named_id(path, config, tokenizer, ("sep_token", "eos_token"))
    pad_token_id = _named_id(path, config, tokenizer, ("pad_token",))
    for name, own, stated in (
        ("cls_token_id", cls_token_id, architecture.cls_token_id),
        ("sep_token_id", sep_token_id, architecture.sep_token_id),
    ):
        if own is not None and stated is not None and own != stated:
            raise CheckpointError(
                f"{folder}: config.json says {name} is {stated} ({tokenizer.id_to_token(stated)!r}), but "
                f"the tokenizer has {tokenizer.id_to_token(own)!r} with id {own} (tokenizer_config.json); "
                "make them agree, or copy both from one model"
            )
    cls_token_id = _first(cls_token_id, architecture.cls_token_id, architecture.bos_token_id)
    if cls_token_id is None:
        raise CheckpointError(
            f"{folder}: neither tokenizer_config.json (cls_token, bos_token) nor config.json (cls_token_id, "
            "bos_token_id) names the token that starts every text; add it"
        )
    return {
        "cls": cls_token_id,
        "sep": _first(sep_token_id, architecture.sep_token_id, architecture.eos_token_id),
        "pad": _first(pad_token_id, architecture.pad_token_id),
    }


def _named_id(
    path: Path, config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer, keys: Sequence[str]
) -> int | None:
    """The id of the first token that `config` names under one of the keys, as text or {"content": text}."""
    for key in keys:
        token = config.get(key)
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is None:
            continue
        token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise CheckpointError(
                f"{path}: {key} is {token!r}, which is not a token of tokenizer.json; copy both from one "
                "model"
            )
        return token_id
    return None


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _read_config(path: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; empty if there is none, since `config.json` names the ids
    too.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # undecodable bytes and endless digits included
        raise CheckpointError(f"cannot read {path}: {error}. Download or copy it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__} instead of a JSON object")
    return config


def _documented_template(special_ids: Mapping[str, int | None], path: Path) -> processors.TemplateProcessing:
    """`[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`, for a file that states no template."""
    cls_token_id, sep_token_id = special_ids["cls"], special_ids["sep"]
    assert cls_token_id is not None
    if sep_token_id is None:
        raise CheckpointError(
            f"{path} has no post_processor, and no token is named that ends a text (sep_token); add it"
        )
    return processors.TemplateProcessing(
        single=["CLS", "$A", "SEP"],
        pair=["CLS", "$A", "SEP", "$B", "SEP"],
        special_tokens=[("CLS", cls_token_id), ("SEP", sep_token_id)],
    )
