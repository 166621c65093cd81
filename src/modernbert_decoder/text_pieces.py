"""Texts cut where tokens certainly end, so that texts of any length are tokenized in bounded memory.

The tokenizers library takes several hundred bytes for each token of a text while it works on it. Here it is
given pieces, whose tokens, put together, are those of the whole text. This module knows neither templates nor
special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Final

import tokenizers
from tokenizers import Encoding, normalizers, pre_tokenizers

# Byte-level BPE works on words, as GPT-2's regular expression finds them. A space or a line break behind
# anything else always begins another word, whatever stands around the two; so does a Japanese or Chinese
# character behind a full stop or comma of its script. And no character before such a place is combined with
# one behind it by Unicode normalization (NFC).
_BORDER: Final = re.compile(r"(?<=\S)[ \n]|(?<=[。，])(?=[ぁ-ゖァ-ヺ\u4e00-\u9fcc])")
PIECE_CHARACTERS: Final = 1 << 15
# Pieces given to the library at a time, which shares them between processors.
_PIECES_AT_ONCE: Final = 8
# Texts in which a last border is looked for from their ends on, in ever longer parts.
_FIRST_PART_CHARACTERS: Final = 64


@dataclass(slots=True)
class FirstTokens:
    """The first tokens of a text.

    Attributes:
        ids: theirs.
        num_tokens: how many the text has; only more than `ids` where they were not to be counted.
    """

    ids: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Continued:
    """A text and some continuations of it, tokenized together.

    Attributes:
        head: the first ids of the text, which no continuation changes.
        own: the other ids of the text.
        tails: for each continuation, what follows `head` in the text that it continues.
    """

    head: list[int]
    own: list[int]
    tails: list[list[int]]


class PieceEncoder:
    """Tokenizes texts, long ones piece by piece.

    Args:
        tokenizer: which it does not change. Where it is none whose words begin at the borders known here,
            texts are tokenized whole.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = _begins_words_at_borders(tokenizer)

    def ids(self, texts: Sequence[str], *, lead: Sequence[int] = ()) -> list[list[int]]:
        """`lead` and the ids of each text."""
        short = iter(self._encodings([text for text in texts if not self._is_long(text)]))
        return [
            self._long_ids(text, lead) if self._is_long(text) else [*lead, *next(short).ids] for text in texts
        ]

    def first_tokens(self, texts: Sequence[str], *, count: int, counts_all: bool) -> list[FirstTokens]:
        """The first `count` ids of each text, and how many there are.

        Long texts are tokenized no further than that takes, unless `counts_all`.
        """
        short = iter(self._encodings([text for text in texts if not self._is_long(text)]))
        results = []
        for text in texts:
            if self._is_long(text):
                results.append(self._first_of_long(text, count, counts_all=counts_all))
            else:
                ids = next(short).ids
                results.append(FirstTokens(ids[:count], len(ids)))
        return results

    def continued(self, text: str, continuations: Sequence[str], *, lead: Sequence[int]) -> Continued:
        """The ids of a text and of the text with each continuation, most of which are the same."""
        border = last_border(text) if self._cuts else 0
        head, tail = text[:border], text[border:]
        own, *tails = self.ids([tail, *(tail + continuation for continuation in continuations)])
        return Continued(self.ids([head], lead=lead)[0], own, tails)

    def _is_long(self, text: str) -> bool:
        return self._cuts and len(text) > PIECE_CHARACTERS

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        if len(texts) == 1 and len(texts[0]) <= PIECE_CHARACTERS:
            # Keeps the library's threads, which complain after a fork, out of the common case; but it holds
            # Python's lock, and a long text would stop every other thread.
            return [self._tokenizer.encode(without_surrogates(texts[0]), add_special_tokens=False)]
        if not texts:
            return []
        cleaned = [without_surrogates(text) for text in texts]
        return self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)

    def _ids_of_pieces(self, text: str) -> Iterator[list[int]]:
        remaining = pieces(text, PIECE_CHARACTERS)
        for num_pieces in chain((1,), repeat(_PIECES_AT_ONCE)):  # one may be enough
            group = list(islice(remaining, num_pieces))
            if not group:
                return
            for encoding in self._encodings(group):
                yield encoding.ids

    def _long_ids(self, text: str, lead: Iterable[int]) -> list[int]:
        ids = list(lead)
        for more in self._ids_of_pieces(text):
            ids += more
        return ids

    def _first_of_long(self, text: str, count: int, *, counts_all: bool) -> FirstTokens:
        first: list[int] = []
        num_tokens = 0
        for ids in self._ids_of_pieces(text):
            first += ids[: count - len(first)]
            num_tokens += len(ids)
            if num_tokens > count and not counts_all:
                break
        return FirstTokens(first, num_tokens)


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces that end at the first border behind `size` characters.

    >>> list(pieces("one two  three", 4))
    ['one two', '  three']
    """
    start = 0
    while len(text) - start > size and (border := _BORDER.search(text, start + size)):
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def last_border(text: str) -> int:
    """Where the last piece of a text begins; 0 where it is all one piece.

    >>> last_border("one two "), last_border("one")
    (7, 0)
    """
    size = _FIRST_PART_CHARACTERS
    while True:
        start = max(0, len(text) - size)
        borders = [border.start() for border in _BORDER.finditer(text, start)]
        if borders or not start:
            return borders[-1] if borders else 0
        size *= 8


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD; the tokenizers library
    refuses them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _begins_words_at_borders(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether every border begins a word: of the regular expression, and of no token that was added."""
    words = tokenizer.pre_tokenizer
    is_usual = (
        isinstance(words, pre_tokenizers.ByteLevel)
        and words.use_regex
        and not words.add_prefix_space
        and (tokenizer.normalizer is None or isinstance(tokenizer.normalizer, normalizers.NFC))
    )
    return is_usual and not any(
        # the first two look at what stands around them
        token.rstrip or token.single_word or _BORDER.search(token.content)
        for token in tokenizer.get_added_tokens_decoder().values()
    )
