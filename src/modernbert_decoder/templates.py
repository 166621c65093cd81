"""A tokenizer's template: the ids that stand before, between and behind the texts of a classifier.

It joins ids that are there, and shortens them as transformers does; it tokenizes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import tokenizers

from modernbert_decoder.errors import ArgumentError, CheckpointError, InputError
from modernbert_decoder.text_pieces import FirstTokens

# Two texts of which each is found in the other's template.
_PROBES: Final = ("a", "b c")


class TextTooLongError(InputError):
    """A text has more tokens than are taken.

    Attributes:
        num_tokens: of the text, those of the template included.
        max_length: how many are taken.
    """

    def __init__(self, num_tokens: int, max_length: int) -> None:
        super().__init__(f"the text has {num_tokens} tokens and at most {max_length} are taken")
        self.num_tokens = num_tokens
        self.max_length = max_length

    def __reduce__(self) -> tuple[type[TextTooLongError], tuple[int, int]]:
        return type(self), (self.num_tokens, self.max_length)


class Template:
    """What a tokenizer puts around `num_texts` texts, one or two.

    Raises:
        CheckpointError: it does more than that, such as repeating a text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, num_texts: int) -> None:
        probes = [tokenizer.encode(text, add_special_tokens=False) for text in _PROBES[:num_texts]]
        first, second = probes[0], probes[1] if num_texts == 2 else None
        whole = tokenizer.post_process(first, second, add_special_tokens=True).ids
        self._frame: list[list[int]] = []
        for probe in probes:
            places = [i for i in range(len(whole)) if whole[i : i + len(probe)] == probe.ids]
            if len(places) != 1:
                raise CheckpointError(
                    "the post_processor of tokenizer.json repeats a text or turns two round, which no "
                    "ModernBERT decoder is trained with; correct it, or pass token ids"
                )
            self._frame.append(whole[: places[0]])
            whole = whole[places[0] + len(probe) :]
        self._frame.append(whole)
        self.num_own_tokens = sum(map(len, self._frame))

    def joined(
        self, texts: Sequence[FirstTokens], *, max_length: int | None, truncation: str | None
    ) -> list[int]:
        """The ids of the texts in the template.

        Args:
            texts: as many as the template has places for.
            max_length: most ids of the whole.
            truncation: "longest_first", "only_first" or "only_second" shortens a text from its end, as
                transformers does; None shortens nothing.

        Raises:
            TextTooLongError: the ids are more, and may not be shortened.
            InputError: `max_length` does not even hold the template's own tokens, or the text that may be
                shortened would have to lose all of its own.
        """
        halves = [text.ids for text in texts]
        if max_length is not None:
            lengths = [text.num_tokens for text in texts]
            num_tokens = self.num_own_tokens + sum(lengths)
            if truncation is None and num_tokens > max_length:
                raise TextTooLongError(num_tokens, max_length)
            if truncation is not None:
                if max_length < self.num_own_tokens:
                    raise ArgumentError(
                        "",
                        "max_length",
                        f" is {max_length}, but the template alone needs {self.num_own_tokens} tokens",
                    )
                kept = _kept_lengths(lengths, max_length - self.num_own_tokens, truncation)
                halves = [ids[:length] for ids, length in zip(halves, kept, strict=True)]
        joined = list(self._frame[0])
        for ids, behind in zip(halves, self._frame[1:], strict=True):
            joined += ids
            joined += behind
        return joined


def _kept_lengths(lengths: Sequence[int], room: int, truncation: str) -> Sequence[int]:
    """How many tokens of each text are left, `room` in all.

    >>> _kept_lengths([9, 4], 7, "longest_first"), _kept_lengths([9, 4], 7, "only_first")
    ([4, 3], [3, 4])
    """
    if truncation == "longest_first":
        return _longest_first(lengths, room)
    if truncation not in ("only_first", "only_second"):
        raise InputError(f"truncation must be longest_first, only_first or only_second, got {truncation!r}")
    chosen = 0 if truncation == "only_first" else 1
    if chosen >= len(lengths):
        raise InputError("truncation is only_second, but there is no second text; use only_first")
    num_other = sum(lengths) - lengths[chosen]
    if sum(lengths) <= room:
        return lengths
    if num_other >= room:
        raise InputError(
            f"truncation is {truncation}, but the other text alone fills max_length with {num_other} tokens "
            f"beside the template; raise max_length, or use longest_first"
        )
    return [room - num_other if i == chosen else length for i, length in enumerate(lengths)]


def _longest_first(lengths: Sequence[int], room: int) -> Sequence[int]:
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    shorter = min(first, second, room // 2)
    return [shorter, room - shorter] if first <= second else [room - shorter, shorter]
