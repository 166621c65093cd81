"""Texts and pairs to token ids under Hugging Face's tokenizer arguments, in the template of the file.

`truncation` and `max_length` mean what they mean there. `padding` is accepted in every spelling and has
nothing to do, since padding changes no result of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from modernbert_decoder.errors import ArgumentError, InputError
from modernbert_decoder.pipelines.arguments import as_count, warn_caller
from modernbert_decoder.templates import TextTooLongError

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM

TOKENIZER_ARGUMENTS: Final = frozenset({"truncation", "max_length", "padding"})
TOKENIZER_ADVICE: Final = {
    "add_special_tokens": "texts take the tokenizer's template; LLM.classify and LLM.embed take token ids",
    "stride": "split the text before",
    "is_split_into_words": "join the words before",
    "pad_to_multiple_of": "padding changes no result",
}
_STRATEGIES: Final = ("longest_first", "only_first", "only_second")
_NO_TRUNCATION: Final = (None, False, "do_not_truncate")
_PADDINGS: Final = (None, True, False, "longest", "max_length", "do_not_pad")
# transformers writes this where a tokenizer states no limit.
_NO_LIMIT: Final = 10**9


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How texts become token ids.

    Attributes:
        strategy: which part of a pair is cut; None cuts nothing.
        limit: most tokens of a text, template included.
    """

    strategy: str | None
    limit: int

    @classmethod
    def of(cls, parameters: Mapping[str, Any], llm: LLM) -> Self:
        """From `truncation`, `max_length` and `padding`.

        Without `max_length` texts are cut at the smaller of the tokenizer's `model_max_length` and the
        context. A `max_length` without `truncation` cuts too, with a warning.

        Raises:
            InputError: values that mean nothing.
        """
        truncation, max_length = parameters.get("truncation"), parameters.get("max_length")
        padding = parameters.get("padding")
        if padding not in _PADDINGS:
            raise InputError(f"padding must be one of {_PADDINGS[1:]}, got {padding!r}")
        strategy = _strategy(truncation)
        if max_length is not None:
            as_count("max_length", max_length)
            if truncation is None:
                warn_caller(
                    "max_length is given without truncation: longer texts are cut, as with truncation=True"
                )
                strategy = "longest_first"
            elif strategy is None:
                raise InputError(
                    f"max_length={max_length} says where to cut, but truncation is {truncation!r}"
                )
            if max_length > llm.max_context:
                raise InputError(
                    f"max_length is {max_length}, but the context holds {llm.max_context} tokens"
                )
            return cls(strategy=strategy, limit=max_length)
        if strategy is None:
            return cls(strategy=None, limit=llm.max_context)
        return cls(strategy=strategy, limit=min(llm.max_context, tokenizer_limit(llm.folder)))

    def ids(self, llm: LLM, text: str, pair: str | None = None) -> list[int]:
        """The ids of a text or a pair, with the template's own tokens.

        Raises:
            InputError: it is too long, and may not be cut or not far enough.
        """
        try:
            return llm.tokenizer.encode_template(text, pair, max_length=self.limit, truncation=self.strategy)
        except TextTooLongError as error:
            raise ArgumentError(
                f"a text has {error.num_tokens} tokens, but the context holds {self.limit}; cut it with ",
                "truncation=True",
                f": {text[:60]!r}",
            ) from error


def tokenizer_limit(folder: Path) -> int:
    """`model_max_length` of `tokenizer_config.json`; very large where none is stated."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return _NO_LIMIT
    stated = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
    return int(stated) if isinstance(stated, int | float) and 0 < stated < _NO_LIMIT else _NO_LIMIT


def _strategy(truncation: Any) -> str | None:
    if truncation in _NO_TRUNCATION:
        return None
    if truncation is True:
        return "longest_first"
    if truncation not in _STRATEGIES:
        raise InputError(
            f"truncation must be True, False or one of {', '.join(_STRATEGIES)}, got {truncation!r}"
        )
    assert isinstance(truncation, str)
    return truncation
